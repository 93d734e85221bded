"""Every stage of the tiny recipe at its real length, killed twenty times: the same figures to the last bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pytest

from minimax_train.recipe import load_plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

RANKS, STEPS, KILLS = 2, (8, 6, 4), 20
WITH_CLOCK = ("tokens_per_second", "mfu", "step_seconds", "save_stall_seconds", "stragglers")


def settings() -> list[str]:
    """The recipe's stages with fewer and smaller steps, and a checkpoint every third step."""
    said = ["checkpoints.every_steps=3", "checkpoints.keep=2", "validation.every_steps=5", "validation.tokens=33000"]
    for number, (stage, steps) in enumerate(zip(load_plan("recipes.tiny:stdlib").stages, STEPS, strict=True)):
        batch, rate = RANKS * stage.length, stage.learning_rate
        said += [
            f"stages.{number}.batch_tokens={batch}",
            f"stages.{number}.tokens={steps * batch}",
            f"stages.{number}.learning_rate.warmup_steps={min(rate.warmup_steps, 3)}",
            f"stages.{number}.learning_rate.decay_tokens={batch if rate.decay_tokens else 0}",
        ]
    return [argument for setting in said for argument in ("--set", setting)]


def begin(run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "minimax_train.cli", "train", "recipes.tiny:stdlib", "--to", str(run), "--ranks", str(RANKS)]
    return subprocess.Popen([*command, *settings()], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def figures(run: Path) -> list[dict[str, object]]:
    """Every line, but for what the clock says."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in WITH_CLOCK} for line in lines]


def reached(run: Path) -> int:
    """The last step that the file of figures has, also in a line that is being written."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((int(line.split('"step": ')[1].split(",")[0]) for line in lines if '"step": ' in line), default=-1)


def test_twenty_kills(tmp_path: Path) -> None:
    """At random moments, and around both transitions: while the stage's end is scored and saved, and right behind it."""
    whole = begin(tmp_path / "whole")
    _, error = whole.communicate()
    assert whole.returncode == 0, error.decode()
    expected = figures(tmp_path / "whole")
    draw, borders = random.Random(8), list(accumulate(STEPS))
    transitions = [(border + behind, delay) for border in borders[:-1] for behind, delay in ((0, 0.05), (0, 0.6), (1, 0.0))]
    points = sorted(transitions + [(draw.randrange(borders[-1]), draw.random()) for _ in range(KILLS - len(transitions))])
    run, kills = tmp_path / "run", 0
    for step, delay in points:
        process = begin(run)
        while process.poll() is None and reached(run) < step:
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= KILLS - 1, "the run ended before it could be killed"
    last = begin(run)
    _, error = last.communicate()
    assert last.returncode == 0, error.decode()
    assert figures(run) == expected
    assert not list((run / "checkpoints").glob(".partial-*"))
