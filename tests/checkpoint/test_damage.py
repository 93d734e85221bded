"""Damaged checkpoints are named, never loaded, never begun over, never pruned to; and repaired from copies."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minimax_train.checkpoint.commit import begin
from minimax_train.checkpoint.manifest import NAME, NewerFormat, _body_digest, damage
from minimax_train.checkpoint.shelf import checkpoints_in, newest_verified, prune
from minimax_train.checkpoint.verify import damage_shared
from minimax_train.cli import main
from minimax_train.engine.session import Session
from minimax_train.plan import Checkpoints
from minimax_train.train.loop import train
from tests.support import little_plan


@pytest.fixture(scope="module")
def made(corpus: Path, alone: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine steps with all its checkpoints; read only."""
    run = tmp_path_factory.mktemp("made") / "run"
    train(little_plan(corpus, checkpoints=Checkpoints(every_steps=1, keep=20)), run, alone)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def shard(checkpoint: Path) -> Path:
    return checkpoint / "tensors" / "__0_0.distcp"


def zero(checkpoint: Path) -> None:
    shard(checkpoint).write_bytes(bytes(shard(checkpoint).stat().st_size))


def of_another_step(checkpoint: Path) -> None:
    shutil.copyfile(shard(checkpoint.with_name("step-00000007")), shard(checkpoint))


def stray(checkpoint: Path) -> None:
    (checkpoint / "tensors" / "__1_0.distcp").write_bytes(b"")


def link(checkpoint: Path) -> None:
    shard(checkpoint).rename(checkpoint.parent / "elsewhere")
    shard(checkpoint).symlink_to(checkpoint.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda c: shard(c).unlink(), "__0_0.distcp is missing"),
    "truncated": (lambda c: os.truncate(shard(c), 1000), "has 1000 bytes, not"),
    "appended": (lambda c: shard(c).open("ab").write(b"\0"), "bytes, not"),
    "zeros": (zero, "its checksum does not hold"),
    "of another step": (of_another_step, "its checksum does not hold"),
    "stray": (stray, "__1_0.distcp does not belong there"),
    "link": (link, "is not a plain file"),
    "no manifest": (lambda c: (c / NAME).unlink(), "manifest.json is missing"),
    "a number of 5,000 digits": (lambda c: (c / NAME).write_text("9" * 5000), "manifest.json cannot be read"),
    "no record": (lambda c: (c / "checkpoint.json").unlink(), "checkpoint.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_is_named(run: Path, kind: str) -> None:
    last = run / "checkpoints" / "step-00000009"
    work, says = DAMAGE[kind]
    work(last)
    newest, passed = newest_verified(run / "checkpoints")
    assert newest == run / "checkpoints" / "step-00000008"
    assert says in passed[last]


def test_a_newer_format_is_refused(run: Path, corpus: Path, alone: Session) -> None:
    """It is no damage: nothing is set aside, and no step is made anew from an older one."""
    last = run / "checkpoints" / "step-00000009"
    manifest = json.loads((last / NAME).read_text())
    body = {"format": 99, "files": manifest["files"]}
    (last / NAME).write_text(json.dumps({**body, "sha256": _body_digest(body)}))
    before = sorted(run.rglob("*"))
    for refused in (damage, lambda path: newest_verified(path.parent), lambda path: damage_shared(path, alone.groups)):
        with pytest.raises(NewerFormat, match=r"step-00000009 has format 99; this version reads 1: use the version that wrote it"):
            refused(last)
    with pytest.raises(ValueError, match="has format 99"):
        train(little_plan(corpus, checkpoints=Checkpoints(every_steps=1, keep=20)), run, alone)
    assert sorted(run.rglob("*")) == before


def test_a_folder_is_never_written_twice(run: Path) -> None:
    with pytest.raises(ValueError, match="step-00000009 already exists and is never written over"):
        begin(run / "checkpoints" / "step-00000009")


def test_a_run_without_an_intact_checkpoint_does_not_begin_anew(run: Path, corpus: Path, alone: Session) -> None:
    for checkpoint in checkpoints_in(run / "checkpoints"):
        shard(checkpoint).unlink()
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=r"no checkpoint of .* verifies: .*step-00000009.*__0_0.distcp is missing.*or move them away"):
        train(little_plan(corpus, checkpoints=Checkpoints(every_steps=1, keep=20)), run, alone)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


def names(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints_in(folder)]


def test_pruning(run: Path) -> None:
    """Steps of 256 tokens, six, then of 512, three; 6 and 9 are ends of stages."""
    folder = run / "checkpoints"
    prune(folder, 1, every_tokens=1000)
    assert names(folder) == [4, 6, 7, 9]  # 4 has 1,024 tokens, 7 has 2,048, 9 has 3,072
    prune(folder, 1)
    assert names(folder) == [6, 9]


def test_a_milestone_that_lost_something_does_not_stand_for_its_tokens(run: Path) -> None:
    folder = run / "checkpoints"
    shard(folder / "step-00000004").unlink()
    prune(folder, 1, every_tokens=1000)
    assert names(folder) == [4, 5, 6, 7, 9]


def test_pruning_keeps_what_verifies(run: Path) -> None:
    folder = run / "checkpoints"
    for step in (8, 9):
        shard(folder / f"step-{step:08d}").unlink()
    assert prune(folder, 2) == []
    assert newest_verified(folder)[0] == folder / "step-00000007"
    assert len(prune(folder, 3)) == 5  # 7 is among the newest three; 1 to 5 go, the end of a stage stays


def test_what_was_just_written_is_not_read_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run / "checkpoints"
    monkeypatch.setattr("minimax_train.checkpoint.shelf.newest_verified", None)  # calling it would be an error
    assert len(prune(folder, 2, verified=folder / "step-00000009")) == 6


def test_pruning_follows_no_link(run: Path, tmp_path: Path) -> None:
    folder, outside = run / "checkpoints", tmp_path / "outside"
    shutil.move(folder / "step-00000001", outside)
    (folder / "step-00000001").symlink_to(outside)
    (folder / "step-00000002" / "link").symlink_to(outside)
    prune(folder, 1)
    assert (folder / "step-00000001").is_symlink() and not (folder / "step-00000002").exists()
    assert damage(outside) is None


def test_repair(run: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    shard(folder / "step-00000008").unlink()
    zero(folder / "step-00000005")
    shutil.rmtree(folder / "step-00000009")
    (folder / ".partial-step-00000010-x").mkdir()
    assert main(["checkpoint", "repair", str(run), "--from", str(made / "checkpoints")]) == 0
    said = capsys.readouterr().out
    assert "removed .partial-step-00000010-x" in said and "step-00000009 was copied from" in said
    assert (
        "step-00000005 is damaged (tensors/__0_0.distcp was changed" in said
        and "step-00000008 is damaged (tensors/__0_0.distcp is missing)" in said
    )
    assert names(folder) == list(range(1, 10)) and all(damage(path) is None for path in checkpoints_in(folder))
    assert len(list(folder.glob("damaged-step-*"))) == 2
    assert main(["checkpoint", "repair", str(run)]) == 0  # nothing left to do


def test_repair_without_copies(run: Path, corpus: Path, alone: Session, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in checkpoints_in(run / "checkpoints"):
        shard(checkpoint).unlink()
    assert main(["checkpoint", "repair", str(run)]) == 1
    assert "is intact" in capsys.readouterr().err
    assert names(run / "checkpoints") == [] and len(list((run / "checkpoints").glob("damaged-*"))) == 9
    with pytest.raises(ValueError, match="no checkpoint but damaged ones .*`checkpoint repair .*or move them away to start again"):
        train(little_plan(corpus, checkpoints=Checkpoints(every_steps=1, keep=20)), run, alone)  # never from the beginning
    assert main(["checkpoint", "repair", str(run), "--from", str(run)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err


def test_list_says_what_they_are(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(made)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].endswith("step-00000006: intact, 1,536 tokens, the end of a stage") and lines[0].endswith("intact, 256 tokens")
