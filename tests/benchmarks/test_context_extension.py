"""benchmarks/context_extension.py: its short form, in which a context really grows; and what its arms and words are made of."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.test_context_bytes import BENCHMARKS


@pytest.fixture
def module() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = {"arms": "extension_arms", "words": "extension_words", "whole": "context_extension"}
        yield SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})


@pytest.mark.timeout(900)
def test_the_context_grows(tmp_path: Path) -> None:
    """Trained at 64 a model finds few of a document's keys at 256; extended, most. The marks are the benchmark's own."""
    command = [sys.executable, str(BENCHMARKS / "context_extension.py"), "--short", "--to", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)})
    assert done.returncode == 0, done.stdout + done.stderr
    cells = {
        arm: list(map(int, re.findall(r"\d+", said)))
        for arm, said in re.findall(r"^\| (before|staged) \| (\d+ \| \d+) \|$", done.stdout, re.M)
    }
    (near, far), (_, extended) = cells["before"], cells["staged"]
    assert near >= 60 and extended >= 60 and extended - far >= 30


def test_arms_take_as_many_tokens_each(module: Any) -> None:
    size = module.whole.whole()
    arms = {arm: module.arms.arm_stages(size.plan, arm) for arm in module.arms.ARMS}
    assert {arm: sum(stage.tokens for stage in stages) for arm, stages in arms.items()} == dict.fromkeys(arms, 655_360)
    first = size.plan.stages[0]
    assert (
        {stage.rope_base for stage in arms["staged, RoPE base kept"]}
        == {first.rope_base}
        < {s.rope_base for s in arms["staged"]} | {first.rope_base}
    )
    assert [list(stage.mixture.weights) for stage in arms["staged, long documents alone"]] == [["512"], ["1024"], ["2048"]]
    assert [stage.length for stage in arms["one jump"]] == [2048] and [stage.length for stage in arms["not longer"]] == [256]


def test_a_missed_mark_is_said(module: Any) -> None:
    """In any seed: too little gained, or too little in the end."""

    def outcome(seed: int, arm: str, share: float) -> Any:
        return module.arms.Outcome(
            seed=seed, arm=arm, right={64: [1.0], 256: [share, share]}, depths=[0.0, 1.0], courses=[], tokens=1, seconds=1
        )

    outcomes = [outcome(1, "before", 0.1), outcome(2, "before", 0.6), outcome(3, "before", 0.1)]
    outcomes += [outcome(1, "staged", 0.9), outcome(2, "staged", 0.85), outcome(3, "staged", 0.7)]
    said = module.words.missed(outcomes, 256, gain=0.3, after=0.8)
    assert [line.split(":")[0] for line in said] == ["seed 2", "seed 3"]
    assert module.words.missed(outcomes[:1] + outcomes[3:4], 256, gain=0.3, after=0.8) == []
    table = module.words.accuracy_table(outcomes, (64, 256))
    assert "| before | 100 (100 to 100) | 27 (10 to 60) |" in table and "| staged | 100 (100 to 100) | 82 (70 to 90) |" in table


def test_norms_of_a_stage(module: Any) -> None:
    steps = [{"grad_norm": norm, "loss": loss} for norm, loss in ((9.0, 3.0), (1.0, 2.5), (2.0, 2.0))]
    steps[0]["refused"] = {}
    course = module.arms.course("512", steps)
    assert (course.first, course.median, course.most, course.refused, course.loss) == (9.0, 2.0, 9.0, 1, (3.0, 2.0))
