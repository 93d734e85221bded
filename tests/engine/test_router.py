"""Routers over ranks: the same choices are dropped, and the balancing loss has the same gradients, as on one rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.batches import NOTHING_TO_PREDICT
from data.batches import Row as DataRow
from minimax_train.engine.session import session
from minimax_train.model.router_options import RouterOptions, Unit
from minimax_train.train.rows import to_row
from parallel.collectives import Channel, all_sum
from parallel.layout import Layout
from parallel.pieces import cut_row
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import Outcome, gradients, hybrid, packed, same, train_on
from tests.parallel.packings import ROWS
from tests.support import little_model, little_plan

CAPACITY = RouterOptions(capacity=1.0)
PACKINGS = tuple(ROWS.values())


def train(place: Place, corpus: Path, layout: Layout) -> Outcome:
    return train_on(place, corpus, layout, {"router": CAPACITY}, steps=3, rows_in_batch=2, packings=PACKINGS)


@pytest.fixture(scope="module")
def one_rank(corpus: Path) -> Outcome:
    outcome: Outcome = run_ranks(1, train, corpus, Layout())[0]
    return outcome


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, Layout(context=2), marks=pytest.mark.slow),
        pytest.param(2, Layout(tensor=2), marks=pytest.mark.slow),
        (4, Layout(context=2, tensor=2, owners="balanced")),
        (4, Layout(pipeline=2, context=2)),
        (4, Layout(tensor=2, expert=2, expert_tensor=2, token_groups=2)),
    ],
    ids=["context2", "tensor2", "context2 tensor2 balanced", "pipeline2 context2", "tensor2 data2 expert2 slices2"],
)
def test_training_with_a_capacity_equals_one_rank(corpus: Path, one_rank: Outcome, ranks: int, layout: Layout) -> None:
    assert min(one_rank.reports[0].routing.dropped) > 0.02
    for ours in run_ranks(ranks, train, corpus, layout):
        same(ours, one_rank)


def auxiliary_alone(place: Place, corpus: Path, layout: Layout) -> dict[str, Tensor]:
    """Gradients of a batch's balancing loss: those of the loss with it, less those without."""
    torch.set_num_threads(1)
    with session(layout=layout, place=place) as joined:
        from minimax_train.engine.trainer import Trainer

        trainer, data = Trainer(little_plan(corpus, model=hybrid(), layout=layout), joined), joined.groups.data
        rows = [to_row(packed(PACKINGS[i], i), joined) for i in range(data.rank(), 2, data.size())]
        found = []
        for coefficient in (1000.0, 0.0):
            trainer.plan = replace(trainer.plan, auxiliary_loss=coefficient)
            found.append(gradients(trainer, rows, joined))
        return {name: (gradient - found[1][name]) / 1000 for name, gradient in found[0].items()}


def test_auxiliary_gradient_does_not_scale_with_the_ranks(corpus: Path) -> None:
    """megatron-core 0.16.1 scales it by tensor * context where losses are divided by the tokens (NVIDIA/Megatron-LM#3672)."""
    one = run_ranks(1, auxiliary_alone, corpus, Layout())[0]
    routers = [name for name in one if "router" in name]
    assert len(routers) == 8
    assert min(one[name].norm() for name in routers) > 1e-3
    for ranks, layout in ((2, Layout(tensor=2)), (2, Layout(context=2)), (4, Layout(tensor=2, context=2, expert=2, expert_tensor=2))):
        ours = run_ranks(ranks, auxiliary_alone, corpus, layout)[0]
        for name, gradient in one.items():
            limit = 1e-5 * gradient.norm() + 1e-9  # the head has none
            assert (ours[name] - gradient).norm() < limit, (name, layout)


def route(place: Place, layout: Layout, options: RouterOptions) -> dict[str, Any]:
    """What a router does with two rows of 48 tokens, in numbers that every order of summation gives alike; and many of them equal.

    On one data-parallel rank they are one row of 96.
    """
    torch.set_num_threads(1)
    with session(layout=layout, place=place) as joined:
        from minimax_train.engine.stage import bare, build_stage

        groups = joined.groups
        router = bare(build_stage(little_model(num_experts=6), joined, router=options)).blocks["0"].experts.router
        g = torch.Generator().manual_seed(5)
        x = torch.randint(-1, 2, (96, 32), generator=g).float()[torch.randint(0, 20, (96,), generator=g)]
        with torch.no_grad():
            router.weight.copy_(torch.randint(-8, 9, router.weight.shape, generator=g) / 16)
        of_row = torch.arange(96).chunk(groups.data.size())[groups.data.rank()]
        pieces = cut_row([0, 5, len(of_row)], layout.context, layout.owners)
        places = pieces.cut(torch.arange(len(of_row)), groups.context.rank)
        mine = of_row[places].chunk(layout.tensor)[groups.tensor.rank()]
        weight, expert, routing = router(x[mine], places)
        routing.auxiliary_loss.backward()
        taken = torch.zeros(96, 2).index_copy(0, mine, weight.detach())
        sent = torch.zeros(96, 2).index_copy(0, mine, expert.float())
        everything = Channel(groups.world)
        return {
            "weights": all_sum(taken, everything.group),
            "experts": all_sum(sent, everything.group),
            "counts": routing.tokens_per_expert,
            "kept": all_sum(routing.here, everything.group),
            "sums": all_sum(routing.sums, everything.group),
            "auxiliary": all_sum(routing.auxiliary_loss.detach(), everything.group),
            "gradient": all_sum(router.weight.grad, everything.group),
        }


@pytest.fixture(scope="module")
def routed() -> dict[str, Any]:
    """By one rank; its unit is a row and all rows in flight at once."""
    outcome: dict[str, Any] = run_ranks(1, route, Layout(), CAPACITY)[0]
    assert 10 < (outcome["experts"] == 6).sum() < 150
    return outcome


@pytest.mark.parametrize(
    ("ranks", "layout", "unit"),
    [
        (2, Layout(context=2), "row"),
        (2, Layout(tensor=2), "row"),
        (4, Layout(context=2, tensor=2, owners="balanced"), "row"),
        (2, Layout(), "data"),
        (4, Layout(context=2, owners="balanced"), "data"),
        (4, Layout(tensor=2), "data"),
    ],
    ids=str,
)
def test_the_same_choices_are_dropped(routed: dict[str, Any], ranks: int, layout: Layout, unit: Unit) -> None:
    one = routed
    for ours in run_ranks(ranks, route, layout, RouterOptions(capacity=1.0, unit=unit)):
        assert all(torch.equal(ours[name], one[name]) for name in ("weights", "experts", "counts", "kept"))
        for name in ("sums", "auxiliary", "gradient"):
            assert (ours[name] - one[name]).norm() < 1e-6 * one[name].norm(), name


def places_given(place: Place, layout: Layout) -> list[Tensor]:
    """What the routers of a model are told of where the tokens of this context rank stand in a row of 96."""
    given: list[Tensor] = []
    with session(layout=layout, place=place) as joined:
        from minimax_train.engine.stage import bare, build_stage

        decoder = bare(build_stage(little_model(), joined))
        for block in decoder.blocks.values():
            block.experts.router.register_forward_pre_hook(lambda _, arguments: given.append(arguments[1]))
        row = to_row(packed((0, 50, 96), 0), joined)
        decoder(row)
        return [row.pieces.join(list(joined.groups.context.begin_all_gather(places, "places").finish())) for places in given]


@pytest.mark.parametrize("owners", ["zigzag", "balanced"])
def test_routers_know_where_their_tokens_stand(owners: Any) -> None:
    given = run_ranks(2, places_given, Layout(context=2, owners=owners))[0]
    assert len(given) == 4
    assert all(torch.equal(places, torch.arange(96)) for places in given)


def end_to_end(rows: list[DataRow]) -> DataRow:
    """The documents of several rows in one."""
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)])
    bounds = [row.cu_seqlens[1:] + start for row, start in zip(rows, starts, strict=False)]
    joint = {
        name: np.concatenate([getattr(row, name) for row in rows]) for name in ("tokens", "labels", "positions", "documents", "starts")
    }
    return DataRow(cu_seqlens=np.concatenate([[0], *bounds]).astype(np.int32), **joint)


def step_of_units(place: Place, corpus: Path, layout: Layout, together: bool) -> tuple[dict[str, Tensor], Any]:
    """(gradients, report) of two units of two rows, which differ in how much they predict; `together`: as one row each."""
    torch.set_num_threads(1)
    rows = [packed(bounds, i) for i, bounds in enumerate(PACKINGS[:4])]
    rows[1].labels[30:], rows[2].labels[:80] = NOTHING_TO_PREDICT, NOTHING_TO_PREDICT
    options = RouterOptions(capacity=1.0, unit="row" if together else "data")
    plan = little_plan(corpus, model=hybrid(), layout=layout, router=options, auxiliary_loss=0.3)
    with session(layout=layout, place=place) as joined:
        from minimax_train.engine.trainer import Trainer

        trainer, data = Trainer(plan, joined), joined.groups.data
        mine = [end_to_end(rows[:2]), end_to_end(rows[2:])] if together else rows[data.rank() :: data.size()]
        batch = [to_row(row, joined) for row in mine]
        return gradients(trainer, batch, joined), trainer.step(batch, 1e-3)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, Layout()), (4, Layout(context=2)), pytest.param(4, Layout(tensor=2), marks=pytest.mark.slow), (4, Layout(pipeline=2))],
    ids=str,
)
def test_a_unit_over_data_ranks_equals_one_row_of_its_rows(corpus: Path, ranks: int, layout: Layout) -> None:
    one, report = run_ranks(1, step_of_units, corpus, Layout(), True)[0]
    assert min(report.routing.dropped) > 0.02
    for ours, theirs in run_ranks(ranks, step_of_units, corpus, layout, False):
        for name, gradient in one.items():
            assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name
        assert (theirs.loss, theirs.grad_norm) == pytest.approx((report.loss, report.grad_norm), rel=1e-5)
        assert theirs.auxiliary_loss == pytest.approx(report.auxiliary_loss, rel=1e-5)
        assert (theirs.routing.share, theirs.routing.dropped) == (report.routing.share, report.routing.dropped)
