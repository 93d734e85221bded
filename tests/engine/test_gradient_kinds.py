"""Gradient norms by kind of weight: of the right weights, whatever the layout, and together the whole norm."""

import math
from pathlib import Path

import pytest
import torch

from minimax_train.engine.gradient_kinds import KINDS, kind_of
from minimax_train.engine.session import Session, session
from minimax_train.engine.trainer import Trainer
from minimax_train.train.rows import to_row
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import hybrid, packed
from tests.support import little_plan

MODEL = hybrid(layers=4)


def step(place: Place, corpus: Path, layout: Layout) -> tuple[float, dict[str, float]]:
    """One step on two rows of a global batch of four or all of them: the whole norm and the norms by kind."""
    with session(layout=layout, place=place) as joined:
        trainer = Trainer(little_plan(corpus, model=MODEL, layout=layout), joined)
        data = joined.groups.data
        rows = [packed([0, 20, 21, 64], seed) for seed in range(4)][data.rank() :: data.size()]
        report = trainer.step([to_row(row, joined) for row in rows], 1e-3)
        return report.grad_norm, report.grad_norms


@pytest.fixture(scope="module")
def alone_step(corpus: Path) -> tuple[float, dict[str, float]]:
    (outcome,) = run_ranks(1, step, corpus, Layout())
    return outcome


def test_kinds_are_of_the_weights_they_name(corpus: Path, alone: Session) -> None:
    """Against the gradients themselves."""
    trainer = Trainer(little_plan(corpus, model=MODEL), alone)
    rows = [to_row(packed([0, 20, 21, 64], seed), alone) for seed in range(4)]
    trainer.zero_gradients()
    trainer.descend(rows)
    squares = dict.fromkeys(KINDS, 0.0)
    names = {kind: [] for kind in KINDS}  # type: ignore[var-annotated]
    for name, parameter in trainer.decoder.named_parameters():
        squares[kind_of(name, MODEL)] += float(parameter.main_grad.double().square().sum())  # type: ignore[attr-defined]
        names[kind_of(name, MODEL)].append(name)
    assert all("blocks.0.attention" in n or "blocks.1.attention" in n for n in names["lightning_early"])
    assert all("blocks.2.attention" in n for n in names["lightning_late"]) and all("blocks.3.attention" in n for n in names["softmax"])
    assert len(names["experts"]) == 8 and len(names["routers"]) == 4 and len(names["norms"]) == 9
    assert names["embedding"] == ["embedding.weight"] and names["head"] == ["head.weight"]
    report = trainer.step(rows, 0.0)
    assert report.grad_norms == pytest.approx({kind: math.sqrt(square) for kind, square in squares.items()}, rel=1e-5)
    assert min(report.grad_norms.values()) > 0
    assert torch.tensor(list(report.grad_norms.values())).norm().item() == pytest.approx(report.grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, Layout()),
        (2, Layout(pipeline=2)),
        (4, Layout(tensor=2, expert=2)),
        (4, Layout(tensor=2, expert=2, expert_tensor=2)),
        (2, Layout(context=2)),
    ],
    ids=["data 2", "pipeline 2", "tensor 2, expert 2", "and expert tensor 2", "context 2"],
)
def test_any_layout(corpus: Path, alone_step: tuple[float, dict[str, float]], ranks: int, layout: Layout) -> None:
    for norm, kinds in run_ranks(ranks, step, corpus, layout):
        assert norm == pytest.approx(alone_step[0], rel=1e-4)
        assert kinds == pytest.approx(alone_step[1], rel=1e-4)
        assert math.hypot(*kinds.values()) == pytest.approx(norm, rel=1e-5)
