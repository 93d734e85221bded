"""Checkpoints while training goes on: the same run to the last bit, and one that goes on where a writer dies."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minimax_train.checkpoint.shelf import checkpoints_in, newest_verified
from minimax_train.engine import shard_writer
from minimax_train.engine.session import Session, session
from minimax_train.engine.shard_writer import ShardWriter
from minimax_train.plan import Checkpoints, Plan
from minimax_train.train.loop import train
from minimax_train.train.pause import Pause
from parallel.testing import run_ranks
from parallel.world import Place
from tests.support import little_plan

WITH_CLOCK = ("tokens_per_second", "mfu", "step_seconds", "save_stall_seconds", "save_failed")
SAVES = Checkpoints(every_steps=1, keep=20)


def figures(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").open())
    return [{name: value for name, value in line.items() if name not in WITH_CLOCK} for line in lines]


def saves(place: Place, plan: Plan, run: Path, killed: tuple[int, ...], slow: float) -> int:
    """Trains; the writers of the last rank's saves number `killed` are killed, and every rank's take `slow` seconds longer."""
    begun = 0

    def begins(self: ShardWriter, *arguments: Any) -> None:
        nonlocal begun
        begun += 1
        whole(self, *arguments)
        if place.rank == place.size - 1 and begun in killed:
            os.kill(self.pid, signal.SIGKILL)

    def slowly(*arguments: Any) -> Any:
        time.sleep(slow)
        return writes(*arguments)

    with pytest.MonkeyPatch.context() as patch, session(place=place) as joined:
        whole, writes = ShardWriter.__init__, shard_writer._write
        patch.setattr(ShardWriter, "__init__", begins)
        patch.setattr(shard_writer, "_write", slowly)
        return train(plan, run, joined).step


def bytes_of(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint."""
    return {
        str(p.relative_to(run)): p.read_bytes() for c in checkpoints_in(run / "checkpoints") for p in sorted(c.rglob("*")) if p.is_file()
    }


def test_the_same_checkpoints_whenever_they_are_written(corpus: Path, tmp_path: Path) -> None:
    """Writers that are still at it while weights change; and the run waits for all of them in turn."""
    plan = little_plan(corpus, checkpoints=replace(SAVES, asynchronous=False))
    run_ranks(2, saves, plan, tmp_path / "waits", (), 0.0)
    run_ranks(2, saves, replace(plan, checkpoints=SAVES), tmp_path / "goes-on", (), 0.3)
    waits, goes_on = bytes_of(tmp_path / "waits"), bytes_of(tmp_path / "goes-on")
    assert waits.keys() == goes_on.keys() and len(checkpoints_in(tmp_path / "waits" / "checkpoints")) == 9
    assert [name for name, content in waits.items() if goes_on[name] != content] == []
    assert figures(tmp_path / "waits") == figures(tmp_path / "goes-on")
    lines = [json.loads(line) for line in (tmp_path / "goes-on" / "metrics.jsonl").open()]
    assert sum(line.get("save_stall_seconds", 0.0) for line in lines) > 0.3  # the end of the first stage waits for its save


def test_training_goes_on_where_a_writer_dies(corpus: Path, tmp_path: Path) -> None:
    plan, run = little_plan(corpus, checkpoints=SAVES), tmp_path / "run"
    assert run_ranks(2, saves, plan, run, (2, 3), 0.0) == [9, 9]
    run_ranks(2, saves, plan, tmp_path / "undisturbed", (), 0.0)
    assert figures(run) == figures(tmp_path / "undisturbed")
    steps = [int(path.name.removeprefix("step-")) for path in checkpoints_in(run / "checkpoints")]
    assert steps == [1, 4, 5, 6, 7, 8, 9]
    assert newest_verified(run / "checkpoints") == (run / "checkpoints" / "step-00000009", {})
    failed = [line["save_failed"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "save_failed" in line]
    assert len(failed) == 2 and all("rank 1: its writer" in said and "exit code -9" in said for said in failed)
    assert not list((run / "checkpoints").glob(".partial-*"))


def test_a_save_that_must_be_is_an_error(corpus: Path, tmp_path: Path) -> None:
    """The end of a stage, which is the sixth."""
    with pytest.raises(RuntimeError, match="OSError: checkpoint .*step-00000006 was not written: rank 1: its writer"):
        run_ranks(2, saves, little_plan(corpus, checkpoints=SAVES), tmp_path / "run", (6,), 0.0)


def test_a_run_that_cannot_save_stops(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="OSError: checkpoint .*step-00000005 was not written.*so it was with the 3 before"):
        run_ranks(2, saves, little_plan(corpus, checkpoints=SAVES), tmp_path / "run", (2, 3, 4, 5), 0.0)
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-00000001"]


def test_a_stop_while_a_save_is_under_way(corpus: Path, tmp_path: Path, alone: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save under way is the one that was asked for: it is waited for, and not made twice."""
    plan, pause, writes, begins, begun = little_plan(corpus, checkpoints=SAVES), Pause(), shard_writer._write, ShardWriter.__init__, 0

    def asked_meanwhile(self: ShardWriter, *arguments: Any) -> None:
        nonlocal begun
        begun += 1
        begins(self, *arguments)
        pause.asked = begun == 2

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return writes(*arguments)

    monkeypatch.setattr(ShardWriter, "__init__", asked_meanwhile)
    monkeypatch.setattr(shard_writer, "_write", slowly)
    assert train(plan, tmp_path / "run", alone, pause=pause).step == 2
    assert begun == 2 and [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-00000001", "step-00000002"]
    monkeypatch.undo()
    assert train(plan, tmp_path / "run", alone).step == 9
    train(plan, tmp_path / "undisturbed", alone)
    assert figures(tmp_path / "run") == figures(tmp_path / "undisturbed")
