"""Copies in a second place: the same bytes, the same that stay, nobody else's, and training goes on whatever becomes of them."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from minimax_train.checkpoint.copies import copy_checkpoint
from minimax_train.checkpoint.manifest import damage, write_manifest
from minimax_train.checkpoint.mirror import Mirror, claim
from minimax_train.checkpoint.shelf import checkpoints_in
from minimax_train.cli import main
from minimax_train.engine.session import Session
from minimax_train.plan import Checkpoints
from minimax_train.train.loop import train
from tests.support import little_plan


def files(checkpoint: Path) -> dict[str, bytes]:
    return {str(p.relative_to(checkpoint)): p.read_bytes() for p in sorted(checkpoint.rglob("*")) if p.is_file()}


def some(folder: Path, size: int = 1000) -> Path:
    (folder / "tensors").mkdir(parents=True)
    for name in ("checkpoint.json", "tensors/__0_0.distcp", "tensors/.metadata"):
        (folder / name).write_bytes(os.urandom(size))
    write_manifest(folder)
    return folder


def test_a_run_is_copied_and_repaired(corpus: Path, alone: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = little_plan(corpus, checkpoints=Checkpoints(every_steps=1, keep=2, mirror=str(tmp_path / "far")))
    run = tmp_path / "run"
    train(plan, run, alone)
    ours, theirs = checkpoints_in(run / "checkpoints"), tmp_path / "far" / "run"
    assert [path.name for path in ours] == ["step-00000006", "step-00000008", "step-00000009"]  # 6 is the end of a stage
    copied = {path.name: files(path) for path in checkpoints_in(theirs)}
    assert copied["step-00000009"] == files(ours[-1]) and len(copied) <= 3  # those that came while another was copied may be missing
    (ours[-1] / "tensors" / "__0_0.distcp").unlink()
    assert main(["checkpoint", "repair", str(run)]) == 0
    assert f"step-00000009 was copied from {theirs}" in capsys.readouterr().out
    assert files(ours[-1]) == copied["step-00000009"]
    other = tmp_path / "elsewhere" / "run"
    with pytest.raises(ValueError, match=f"{theirs} has copies of another run's checkpoints, {run}: choose another one"):
        train(plan, other, alone)
    assert not other.exists()
    assert {path.name: files(path) for path in checkpoints_in(theirs)} == copied


def test_a_copy_that_is_damaged_on_the_way(tmp_path: Path) -> None:
    source = some(tmp_path / "source")
    shard = source / "tensors" / "__0_0.distcp"
    shard.write_bytes(bytes(1000))
    with pytest.raises(OSError, match="source/tensors/__0_0.distcp was changed: its checksum does not hold"):
        copy_checkpoint(source, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    shard.unlink()
    with pytest.raises(ValueError, match="tensors/__0_0.distcp is missing"):
        copy_checkpoint(source, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = some(tmp_path / "source")
    assert main(["checkpoint", "copy", str(source), "--to", str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"{source}: 100%", f"{tmp_path / 'copy'}: intact"]
    assert files(source) == files(tmp_path / "copy") and damage(tmp_path / "copy") is None
    assert main(["checkpoint", "copy", str(source), "--to", str(tmp_path / "copy")]) == 2
    assert "already exists and is never written over" in capsys.readouterr().err
    assert main(["checkpoint", "copy", str(tmp_path / "none"), "--to", str(tmp_path / "other")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_copy_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    told: list[str] = []
    place = tmp_path / "far"
    claim(place, tmp_path)
    mirror = Mirror(place, Checkpoints(mirror=str(place)), told.append, silent=1.0)
    first, second = some(tmp_path / "step-00000001"), some(tmp_path / "step-00000002")
    mirror.copy(first)
    assert mirror._process is not None
    os.kill(mirror._process.pid, signal.SIGSTOP)
    mirror.copy(second)
    assert mirror.needed == {first, second}
    while not told:
        mirror.look()
        time.sleep(0.02)
    assert told == [f"{first} was not copied to {place / first.name} (nothing was copied for 1 s); training goes on"]
    mirror._silent = 60.0
    mirror.finish(60)
    assert mirror.needed == set() and len(told) == 1
    assert sorted(p.name for p in place.iterdir()) == ["run", "step-00000002"] and files(place / "step-00000002") == files(second)


def test_what_fails_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    place = tmp_path / "far"
    claim(place, tmp_path)
    mirror = Mirror(place, Checkpoints(mirror=str(place)), told.append)
    mirror.copy(some(tmp_path / "step-00000001"))
    shutil.rmtree(tmp_path / "step-00000001")
    mirror.finish(60)
    assert len(told) == 1 and "step-00000001 was not copied to" in told[0] and "training goes on" in told[0]
    assert sorted(p.name for p in place.iterdir()) == ["run"]


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoints.mirror: .* cannot be used: Not a directory"):
        claim(tmp_path / "file" / "run", tmp_path)
