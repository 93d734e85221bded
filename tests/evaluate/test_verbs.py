"""`evaluate needle` and `generate` as a user meets them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.needles import TASKS
from data.retrieval import Vocabulary
from minimax_train.cli import main
from minimax_train.report.needles import read_needles

SMALL = Vocabulary(keys=12, values=9, filler=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(SMALL.tokenizer().content)
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """call(*arguments) -> exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return run


def test_needle_writes_what_it_says(checkpoint: Path, tokenizer: Path, tmp_path: Path, call) -> None:  # type: ignore[no-untyped-def]
    options = ("--lengths", "50,96", "--depths", "0,0.6", "--samples", 2, "--seed", 11, "--tokenizer", tokenizer)
    status, out, error = call("evaluate", "needle", checkpoint, *options, "--to", tmp_path / "out", "--json")
    assert status == 0, error
    written = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert json.loads(out) == written
    assert (written["step"], written["trained_length"], written["rope_base"], written["seed"]) == (7, 64, 500.0, 11)
    asked = [(task, length, depth) for task in TASKS for length in (50, 96) for depth in (0.0, 0.6)]
    assert [(cell["task"], cell["length"], cell["depth"]) for cell in written["cells"]] == asked
    assert (tmp_path / "out" / "needle.png").read_bytes().startswith(b"\x89PNG")
    maps = read_needles(written, tmp_path)
    assert maps is not None
    assert maps.tasks[0].loss.tolist() == [[written["cells"][i]["loss"] for i in row] for row in ((0, 2), (1, 3))]
    status, out, error = call("evaluate", "needle", checkpoint, *options, "--tasks", "single")
    assert status == 0
    assert written["keys"] == maps.keys == "4"
    assert out.splitlines()[1].startswith("single")
    assert len(out.splitlines()) == 3
    assert "nothing is written" in error
    assert not (checkpoint / "evaluation").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tasks", "single,none"), "'none'"),
        (("--keys", "2/64"), "--keys is '2/64'"),
        (("--lengths", "2k"), "'2k'"),
        (("--depths", "0.5,2", "--tokenizer", "T"), "from 0 to 1"),
        (("--set", "layout.pipeline=2", "--ranks", 2), "layout.pipeline is 2"),
        (("--set", "layout.contxt=2"), "did you mean 'context'"),
        (("--set", "layout.context=x"), "layout.context is 'x'"),
        (("--set", "layout.context=2"), "1 ranks were started"),
        (("--set", "seed=2"), "'seed'"),
        (("--ranks", 0), "--ranks is 0"),
        ((), "say --tokenizer T"),
    ],
)
def test_needle_refuses(checkpoint: Path, tokenizer: Path, options: tuple[object, ...], says: str, call) -> None:  # type: ignore[no-untyped-def]
    status, _, error = call("evaluate", "needle", checkpoint, *(tokenizer if word == "T" else word for word in options))
    assert status == 2
    assert says in error
    assert error.count("minimax-train: error") == error.count("\n") == 1


def test_generate_goes_on_from_ids_and_text(checkpoint: Path, tokenizer: Path, tmp_path: Path, call) -> None:  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 29, (2, 13), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    asked = ("--input-ids", tmp_path / "ids.safetensors", "--tokens", 9, "--past-end")
    status, out, error = call("generate", checkpoint, *asked)
    assert status == 0, error
    rows = [[int(number) for number in line.split()] for line in out.splitlines()]
    assert [len(row) for row in rows] == [9, 9]
    assert rows[0] != rows[1]
    assert call("generate", checkpoint, *asked, "--seed", 7) == (0, out, "")  # the likeliest tokens need no seed
    assert call("generate", checkpoint, *asked, "--temperature", 2)[1] != out
    prompt = " ".join(SMALL.words[i] for i in ids[0].tolist())
    status, out, error = call("generate", checkpoint, "--prompt", prompt, "--tokens", 9, "--past-end", "--tokenizer", tokenizer, "--json")
    assert status == 0, error
    (made,) = json.loads(out)
    assert (made["prompt_tokens"], made["ids"]) == (13, rows[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompt", "key1"), "say --tokenizer T"),
        (("--prompt", "key1", "--tokens", -1), "--tokens is -1"),
        (("--prompt", "key1", "--temperature", -2), "temperature is -2"),
    ],
)
def test_generate_refuses(checkpoint: Path, options: tuple[object, ...], says: str, call) -> None:  # type: ignore[no-untyped-def]
    status, _, error = call("generate", checkpoint, *options)
    assert status == 2
    assert says in error
    assert error.count("minimax-train: error") == error.count("\n") == 1
