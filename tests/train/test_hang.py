"""A rank that holds the others up is named within seconds, all end, and what each was doing is kept: real ranks, really stopped."""

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minimax_train.checkpoint.store import Save
from minimax_train.engine.session import session
from minimax_train.engine.trainer import Trainer
from minimax_train.plan import Checkpoints, Plan
from minimax_train.train.hang import pulse_of
from minimax_train.train.loop import train
from parallel.layout import Layout
from parallel.pulse import HUNG
from parallel.testing import run_ranks
from parallel.world import Place
from tests.support import little_plan

LIMIT, CULPRIT = 2.0, 1


def sleep() -> None:
    time.sleep(60)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(60)  # PyDLL does not let go of the lock


def faulty(place: Place, plan: Plan, run: Path, fault: Callable[[], None] | None) -> int:
    """Trains; the culprit's third step begins with the fault."""
    steps, place = 0, replace(place, node=f"n{place.rank}")

    def step(self: Trainer, *arguments: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if fault is not None and place.rank == CULPRIT and steps == 3:
            time.sleep(0.5)  # it says that it has begun the step
            (run / "faulty-since").write_text(str(time.time()))
            fault()
        return whole_step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pulse_of(place, run, LIMIT) as pulse, session(layout=plan.layout, place=place) as joined:
        whole_step = Trainer.step
        patch.setattr(Trainer, "step", step)
        return train(plan, run, joined, pulse=pulse).step


@pytest.mark.parametrize(
    ("layout", "fault", "kind"),
    [
        (Layout(tensor=2), sleep, "hung"),
        (Layout(tensor=2), stop, "stopped"),
        (Layout(tensor=2), hold_the_interpreter, "stopped"),
        (Layout(pipeline=2), sleep, "hung"),
    ],
    ids=["asleep", "stopped", "interpreter held", "asleep in a pipeline"],
)
def test_the_rank_is_named(corpus: Path, tmp_path: Path, layout: Layout, fault: Callable[[], None], kind: str) -> None:
    plan, run = little_plan(corpus, layout=layout), tmp_path / "run"
    with pytest.raises(RuntimeError, match=f"exit code {HUNG} "):
        run_ranks(2, faulty, plan, run, fault)
    (folder,) = (run / "logs").glob("hang-*")
    verdict = json.loads((folder / "verdict.json").read_text())
    assert (verdict["kind"], verdict["ranks"]) == (kind, [CULPRIT])
    assert "a step" in str(verdict["lines"])
    assert (folder / "verdict.json").stat().st_mtime - float((run / "faulty-since").read_text()) < 5
    assert f"in {fault.__name__}\n" in (folder / f"rank-{CULPRIT}.txt").read_text()  # its stack, though it could not write it by itself
    assert "in step\n" in (folder / "rank-0.txt").read_text()
    assert (folder / "nodes").read_text() == f"n{CULPRIT}\n"


def healthy(place: Place, plan: Plan, run: Path) -> int:
    """Trains; the first rank commits slowly, the others wait in a collective, none uses CPU time; and the clock jumps by hours."""

    def slowly(*arguments: Any) -> None:
        if place.rank == 0:
            time.sleep(2 * LIMIT)
        whole(*arguments)

    with pytest.MonkeyPatch.context() as patch, pulse_of(place, run, LIMIT) as pulse, session(place=place) as joined:
        whole = Save._commit
        patch.setattr(Save, "_commit", slowly)
        patch.setattr(time, "time", lambda clock=time.time: clock() + (3600 if int(clock()) % 2 else -3600))
        return train(plan, run, joined, pulse=pulse).step


def test_a_slow_save_is_no_hang(corpus: Path, tmp_path: Path) -> None:
    plan = replace(little_plan(corpus), checkpoints=Checkpoints(every_steps=100, keep=1))
    assert run_ranks(2, healthy, plan, tmp_path / "run") == [9, 9]
    assert not (tmp_path / "run" / "logs").exists() or not list((tmp_path / "run" / "logs").glob("hang-*"))


def slow(place: Place, plan: Plan, run: Path) -> int:
    """Trains; the culprit is at work 0.8 s longer in every step, and the first rank looks for stragglers once in 2 s."""

    def step(self: Trainer, *arguments: Any, **named: Any) -> Any:
        if place.rank == CULPRIT:
            time.sleep(0.8)
        return whole_step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pulse_of(place, run, LIMIT) as pulse, session(place=place) as joined:
        whole_step, usual = Trainer.step, pulse.stragglers
        patch.setattr(Trainer, "step", step)
        patch.setattr(pulse, "stragglers", lambda: usual(1.5))
        return train(plan, run, joined, pulse=pulse).step


def test_a_straggler_is_told_and_not_killed(corpus: Path, tmp_path: Path) -> None:
    plan, run = little_plan(corpus), tmp_path / "run"
    plan = replace(plan, stages=(replace(plan.stages[0], tokens=6 * 256),))
    assert run_ranks(2, slow, plan, run) == [6, 6]
    lines = map(json.loads, (run / "metrics.jsonl").open())
    told = [one for line in lines for one in line.get("stragglers", []) if one["phase"] == "a step"]
    assert told and all(one["rank"] == CULPRIT and one["score"] < 0.9 for one in told)  # of two ranks the median is the mean
