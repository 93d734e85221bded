"""Context parallelism in all its forms changes nothing, over twenty steps; test_layouts has it beside the other kinds of layout."""

import itertools
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minimax_train.engine.session import session
from minimax_train.model.row import Row
from minimax_train.train.rows import to_row
from parallel.collectives import all_sum
from parallel.layout import Layout
from parallel.pieces import cut_row
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import Outcome, hybrid, packed, same, train_on
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
    [Layout(context=2, exchange="gather"), Layout(context=2, exchange="transpose", owners="balanced")],
    ids=["gather", "transpose balanced"],
)
def test_two_ranks_equal_one(corpus: Path, one_rank: Outcome, layout: Layout) -> None:
    for ours in run_ranks(2, train, corpus, layout, {}):
        same(ours, one_rank)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(context=4),
        Layout(context=4, exchange="pruned", owners="balanced"),
        pytest.param(Layout(context=4, key_value=2), marks=pytest.mark.slow),
    ],
    ids=["auto", "pruned balanced", "two levels"],
)
def test_four_ranks_equal_one(corpus: Path, one_rank: Outcome, layout: Layout) -> None:
    """And they report how unevenly softmax attention's work was shared out, the mean over the batch's rows."""
    ours = run_ranks(4, train, corpus, layout, {})[3]
    same(ours, one_rank)
    uneven = [cut_row(bounds, 4, layout.owners).imbalance() for bounds in PACKINGS]
    assert max(uneven) > 1.4 or layout.owners == "balanced"
    for step, report in enumerate(ours.reports):
        rows = [uneven[row % len(uneven)] for row in (2 * step, 2 * step + 1)]
        assert report.imbalance == pytest.approx(sum(rows) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(context=8), Layout(context=4, tensor=2), Layout(context=4, key_value=2)], ids=str)
def test_eight_ranks_equal_one(corpus: Path, one_rank: Outcome, layout: Layout) -> None:
    same(run_ranks(8, train, corpus, layout, {})[7], one_rank)


def test_late_exchanges_give_the_same_bits(corpus: Path) -> None:
    early, late = (run_ranks(2, partial(train, late=mode), corpus, Layout(context=2), {})[0] for mode in (False, True))
    assert [r.loss for r in early.reports] == [r.loss for r in late.reports]
    for name, gradient in early.gradients.items():
        assert torch.equal(gradient, late.gradients[name]), name


def losses_and_gradients(place: Place, layout: Layout, alone: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each token's loss and the gradients of their weighted sum, for a row of 96 tokens: packed, or each document in a row of its own."""
    from minimax_train.engine.stage import bare, build_stage

    torch.set_num_threads(1)
    bounds = ROWS["before and after borders"]
    g = torch.Generator().manual_seed(0)
    tokens, weights = torch.randint(0, 300, (97,), generator=g), torch.rand(96, generator=g)
    documents = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    with session(layout=layout, place=place) as joined:
        decoder, channel = bare(build_stage(hybrid(), joined, seed=3)), joined.groups.context
        parts = [[d] for d in documents] if alone else [documents]
        total = []
        for part in parts:
            whole = Row.of_documents([tokens[d] for d in part]).with_labels(torch.cat([tokens[d.start + 1 : d.stop + 1] for d in part]))
            row = whole.cut(layout, channel.rank)
            losses, _ = decoder(row)
            (losses * row.pieces.cut(torch.cat([weights[d] for d in part]), channel.rank)).sum().backward()
            total.append(row.pieces.join(list(channel.begin_all_gather(losses.detach(), "losses").finish())))
        return torch.cat(total), {name: all_sum(p.grad, channel.group) for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_packed_row_equals_its_documents_alone(ranks: int) -> None:
    alone, gradients = run_ranks(1, losses_and_gradients, Layout(), True)[0]
    for losses, ours in run_ranks(ranks, losses_and_gradients, Layout(context=ranks), False):
        assert (losses - alone).norm() < 1e-5 * alone.norm()
        for name, gradient in gradients.items():
            assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_bf16_follows_one_rank(corpus: Path) -> None:
    one, two = (run_ranks(ranks, train, corpus, Layout(context=ranks), {"precision": "bf16"})[0] for ranks in (1, 2))
    for a, b in zip(two.reports, one.reports, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=5e-2)


BAD_ROWS: dict[str, tuple[int, ...]] = {
    r"cu_seqlens ends at 60 in a row of 62 tokens": (0, 60),
    r"cu_seqlens ends at 64 in a row of 62 tokens": (0, 60, 64),
    r"cu_seqlens is \[\]; it must begin with 0": (),
    r"cu_seqlens is \[0, 50, 40, 62\]; it must begin with 0 and never fall": (0, 50, 40, 62),
    r"cu_seqlens is \[4, 62\]; it must begin with 0": (4, 62),
}
"""For 62 tokens, which two ranks fill up to 64."""


def refused(place: Place) -> list[str]:
    row, said = packed((0, 62), 0), []
    with session(layout=Layout(context=2), place=place) as joined:
        filled = to_row(row, joined)
        assert filled.pieces.bounds == (0, 62, 64)
        assert len(filled.tokens) == 32
        for bounds in BAD_ROWS.values():
            with pytest.raises(ValueError, match="^[^\n]*$") as refusal:
                to_row(replace(row, cu_seqlens=np.array(bounds, np.int32)), joined)
            said.append(str(refusal.value))
    return said


def test_documents_that_do_not_fit_the_row_are_refused_on_every_rank() -> None:
    """Also where the row is filled up: what is missing is no document that anybody packed."""
    first, second = run_ranks(2, refused)
    assert first == second
    for said, words in zip(first, BAD_ROWS, strict=True):
        assert re.search(words, said), said


def test_what_the_ranks_cannot_share_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"stage '64': length is 64, not a multiple of 6 \(2 \* layout.context pieces\): use 60"):
        little_plan(corpus, layout=Layout(context=3))
    with pytest.raises(ValueError, match=r"layout.key_value is 4"):
        little_plan(corpus, layout=Layout(context=4, key_value=4))
    with pytest.raises(ValueError, match=r"layout.key_value"):
        little_plan(corpus, layout=Layout(context=4, key_value=2, tensor=2))
