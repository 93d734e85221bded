"""The deterministic mode: torch refuses operators without one order, inside the session alone; on a CPU the bits are the same anyway."""

import json
from pathlib import Path

import pytest
import torch

from minimax_train.engine.session import session
from minimax_train.train.loop import train
from tests.support import little_plan


def test_the_whole_loop_runs_without_an_unsteady_operator(corpus: Path, tmp_path: Path) -> None:
    losses = []
    for deterministic in (False, True):
        plan, run = little_plan(corpus, steps=2, deterministic=deterministic), tmp_path / str(deterministic)
        with session(deterministic=plan.deterministic) as alone:
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            train(plan, run, alone)
        losses.append([line.get("loss") for line in map(json.loads, (run / "metrics.jsonl").open())])
    assert losses[0] == losses[1]
    assert not torch.are_deterministic_algorithms_enabled()


def test_it_is_switched_on() -> None:
    """An operator without a deterministic form is refused inside, and runs outside."""
    unsteady = torch.nn.MaxUnpool1d(2)
    x, places = torch.ones(1, 1, 2), torch.tensor([[[0, 2]]])
    with session(deterministic=True), pytest.raises(RuntimeError, match="deterministic"):
        unsteady(x, places)
    assert unsteady(x, places).shape == (1, 1, 4)
