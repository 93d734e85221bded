import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from data import standard_library
from data.corpus import Document
from data.corpus import standard_library as sources_of
from data.dataset import TokenDataset, verify
from data.standard_library import LENGTH_CLASSES, prepare_standard_library
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SMALL = Path(sysconfig.get_path("stdlib"), "email")  # real, everywhere, about 0.5 MB, one document of over 32K tokens
ROOMY: dict[str, Any] = {"held_out_tokens": 200_000, "quiet": True}


def texts_of(prefix: Path) -> list[str]:
    dataset = TokenDataset.open(prefix)
    tokenizer = load_tokenizer(dataset.tokenizer_file)
    return [tokenizer.decode(dataset.tokens(document).tolist()[:-1]) for document in range(dataset.documents)]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def seen_by_tokenizer() -> list[str]:
    return []


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, seen_by_tokenizer: list[str]) -> Path:
    """The real library as Debian's Python has it: without test/."""
    directory = tmp_path_factory.mktemp("library") / "stdlib"

    def train(texts: Iterable[str], *, vocabulary: int) -> Tokenizer:
        seen_by_tokenizer.extend(texts)
        return train_tokenizer(seen_by_tokenizer, vocabulary=vocabulary)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standard_library, "train_tokenizer", train)
        prepare_standard_library(directory, without=["test"], quiet=True)
    return directory


def test_every_length_class_is_held_out_within_the_budget(library: Path) -> None:
    verify(library / "train")
    held_out = verify(library / "validation")
    assert held_out.vocabulary == 1024
    assert 80_000 < held_out.token_count <= 100_000
    for low, high in zip(LENGTH_CLASSES, [*LENGTH_CLASSES[1:], 10**9], strict=True):
        assert ((held_out.lengths >= low) & (held_out.lengths < high)).sum() >= 2, f"{low} to {high}"
    record = json.loads((library / "standard_library.json").read_text())
    assert list(record["held_out"].values()) == held_out.lengths.tolist()


def test_no_text_is_lost_or_on_both_sides(library: Path) -> None:
    training, held_out = texts_of(library / "train"), texts_of(library / "validation")
    documents = {document.source: document for document in sources_of(without=["test"]) if isinstance(document, Document)}
    record = json.loads((library / "standard_library.json").read_text())
    assert held_out == [documents[source].text for source in record["held_out"]]
    kept = [document.text for source, document in documents.items() if document.text and source not in record["doubles_left_out"]]
    assert sorted(training + held_out) == sorted(kept)
    plain = {" ".join(text.split()) for text in training}
    assert not any(" ".join(text.split()) in plain for text in held_out)
    lines = {line.strip() for text in training for line in text.splitlines()}
    for text in held_out:  # and no near copy: most of each held-out text stands nowhere in training
        own = {line.strip() for line in text.splitlines()}
        assert sum(len(line) for line in own - lines) >= 0.5 * sum(map(len, own))


def test_the_tokenizer_learned_from_training_text_only(library: Path, seen_by_tokenizer: list[str]) -> None:
    training, held_out = set(texts_of(library / "train")), set(texts_of(library / "validation"))
    assert len(seen_by_tokenizer) > 100
    assert set(seen_by_tokenizer) <= training | {""}
    assert not set(seen_by_tokenizer) & held_out
    for name in ("tokenizer.json", "train.tokenizer.json", "validation.tokenizer.json"):
        assert (library / name).read_bytes() == (library / "tokenizer.json").read_bytes()


def test_it_is_made_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard_library, "train_tokenizer", lambda *_, **__: pytest.fail("made again"))
    again = prepare_standard_library(library, without=["test"], quiet=True)
    assert (again.train, again.validation, again.tokenizer) == (library / "train", library / "validation", library / "tokenizer.json")
    with pytest.raises(ValueError, match=r"was made with vocabulary 1024, asked for 512; seed 0, asked for 7: choose another"):
        prepare_standard_library(library, without=["test"], vocabulary=512, seed=7, quiet=True)


def test_deterministic_in_arguments_and_files_and_another_seed_draws_others(tmp_path: Path) -> None:
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_standard_library(tmp_path / name, seed=seed, root=SMALL, **ROOMY)
        made[name] = files_of(tmp_path / name)
    assert made["a"] == made["b"]
    assert made["a"].keys() == made["c"].keys()
    first, other = (json.loads(made[name]["standard_library.json"])["held_out"] for name in ("a", "c"))
    assert first != other


def test_of_the_longest_class_those_just_over_its_bound_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard_library, "POOL", 2)
    (tmp_path / "root").mkdir()
    for number in range(9):
        lines = (f"{number}: the {i}th of many lines, {i * i}" for i in range(3000 + 500 * (number * 4 % 9)))
        (tmp_path / "root" / f"{number}.py").write_text("\n".join(lines))
    prepare_standard_library(tmp_path / "out", root=tmp_path / "root", **ROOMY)
    assert list(json.loads((tmp_path / "out" / "standard_library.json").read_text())["held_out"]) == ["0.py", "7.py"]  # the shortest


def test_near_copies_stay_in_training(tmp_path: Path) -> None:
    """encodings/ is mostly tables that repeat one another."""
    root = Path(sysconfig.get_path("stdlib"), "encodings")
    prepare_standard_library(tmp_path / "out", root=root, **ROOMY)
    held_out = json.loads((tmp_path / "out" / "standard_library.json").read_text())["held_out"]
    assert held_out
    assert not any(name.startswith(("cp12", "iso8859")) for name in held_out)


def test_files_that_are_not_utf8_and_doubles_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(SMALL, root)
    (root / "latin1.py").write_bytes(b"# caf\xe9")
    (root / "zz_copy.py").write_text((root / "message.py").read_text().replace("\n", "\r\n\r\n"))
    prepare_standard_library(tmp_path / "out", root=root, **ROOMY)
    record = json.loads((tmp_path / "out" / "standard_library.json").read_text())
    assert record["not_utf8"] == ["latin1.py"]
    assert record["doubles_left_out"] == ["zz_copy.py"]
    assert TokenDataset.open(tmp_path / "out" / "train").sidecar.skipped == ("latin1.py: not UTF-8",)


def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from data.standard_library import prepare_standard_library as make\n"
        "print(make(sys.argv[1], held_out_tokens=200_000, root=Path(sys.argv[2]), quiet=True).train)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out"), str(SMALL)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        output, error = child.communicate(timeout=120)
        assert (child.returncode, output.strip()) == (0, str(tmp_path / "out" / "train")), error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify(tmp_path / "out" / "train")


def test_the_later_of_two_takes_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced: another process commits while this one is at work."""
    prepare_standard_library(tmp_path / "first", root=SMALL, **ROOMY)
    before = files_of(tmp_path / "first")
    real = standard_library.commit_folder

    def late(stage: Path, target: Path) -> bool:
        shutil.copytree(tmp_path / "first", target)
        committed = real(stage, target)
        assert not committed
        return committed

    monkeypatch.setattr(standard_library, "commit_folder", late)
    prepare_standard_library(tmp_path / "second", root=SMALL, **ROOMY)
    assert files_of(tmp_path / "second") == before
    with pytest.raises(ValueError, match="was made with seed 0, asked for 1"):
        prepare_standard_library(tmp_path / "third", root=SMALL, seed=1, **ROOMY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "third"]


def test_what_it_cannot_do_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not a prepared standard library"):
        prepare_standard_library(other, quiet=True)
    with pytest.raises(ValueError, match="held_out_tokens 5000: too few for 2 documents of every length class"):
        prepare_standard_library(tmp_path / "few", held_out_tokens=5000, root=SMALL, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
