"""Context parallelism changes nothing: losses, every gradient, their norm, the auxiliary loss, and twenty optimizer steps."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import Outcome, same, train_on
from tests.parallel.packings import ROWS
from tests.support import little_plan

STEPS = 20
PACKINGS = tuple(ROWS.values())


def train(place: Place, corpus: Path, layout: Layout, changes: dict[str, Any], late: bool = False) -> Outcome:
    """Rows of 96 tokens: one document, many, and documents that begin on, before and after the borders of pieces."""
    return train_on(place, corpus, layout, changes, steps=STEPS, rows_in_batch=2, packings=PACKINGS, late=late)


@pytest.fixture(scope="module")
def one_rank(corpus: Path) -> Outcome:
    outcome: Outcome = run_ranks(1, train, corpus, Layout(), {})[0]
    return outcome


@pytest.mark.parametrize(
    "layout",
    [Layout(context=2), Layout(context=2, exchange="gather"), Layout(context=2, exchange="transpose", owners="balanced")],
    ids=["default", "gather", "transpose balanced"],
)
def test_two_ranks_equal_one(corpus: Path, one_rank: Outcome, layout: Layout) -> None:
    for ours in run_ranks(2, train, corpus, layout, {}):
        same(ours, one_rank, weights=5e-5)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(context=4, exchange="pruned", owners="balanced"),
        Layout(context=4, key_value=2),
        Layout(context=2, tensor=2),
        Layout(context=2),
    ],
    ids=["context4", "two levels", "tensor2", "data2"],
)
def test_four_ranks_equal_one(corpus: Path, one_rank: Outcome, layout: Layout) -> None:
    same(run_ranks(4, train, corpus, layout, {})[3], one_rank, weights=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(context=8), Layout(context=4, tensor=2), Layout(context=4, key_value=2)], ids=str)
def test_eight_ranks_equal_one(corpus: Path, one_rank: Outcome, layout: Layout) -> None:
    same(run_ranks(8, train, corpus, layout, {})[7], one_rank, weights=5e-5)


def test_late_exchanges_give_the_same_bits(corpus: Path) -> None:
    early, late = (run_ranks(2, partial(train, late=mode), corpus, Layout(context=2), {})[0] for mode in (False, True))
    assert [r.loss for r in early.reports] == [r.loss for r in late.reports]
    for name, gradient in early.gradients.items():
        assert torch.equal(gradient, late.gradients[name]), name


def test_bf16_follows_one_rank(corpus: Path) -> None:
    one, two = (run_ranks(ranks, train, corpus, Layout(context=ranks), {"precision": "bf16"})[0] for ranks in (1, 2))
    for a, b in zip(two.reports, one.reports, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=5e-2)


def test_what_the_ranks_cannot_share_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"stage '64': length is 64, not a multiple of 6 \(2 \* layout.context pieces\): use 60"):
        little_plan(corpus, layout=Layout(context=3))
    with pytest.raises(ValueError, match=r"layout.key_value is 4"):
        little_plan(corpus, layout=Layout(context=4, key_value=4))
    with pytest.raises(ValueError, match=r"layout.key_value"):
        little_plan(corpus, layout=Layout(context=4, key_value=2, tensor=2))
