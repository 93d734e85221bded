"""Expert parallelism where something is particular: slices that several ranks have, the norm, the auxiliary loss, idle experts.

That plain layouts change nothing: test_layouts; checkpoints: test_reshard.

Numbers of issues are NVIDIA/Megatron-LM's: ways in which counting over experts has gone wrong there.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from minimax_train.engine.session import session
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import STEPS, Outcome, hybrid, same, train, train_on, worst
from tests.support import little_model, little_plan

RUNS: dict[str, tuple[int, Layout]] = {
    "one": (1, Layout()),
    "tensor2 expert2": (2, Layout(tensor=2, expert=2)),
    "expert2 slices2": (4, Layout(expert=2, expert_tensor=2, token_groups=2)),
    "tensor2 slices2": (4, Layout(tensor=2, expert_tensor=2)),
    "tensor4 slices2": (4, Layout(tensor=4, expert_tensor=2)),
    "data2 slices2": (4, Layout(expert_tensor=2)),
}
Runs = Callable[[str], list[Outcome]]


@pytest.fixture(scope="module")
def runs(corpus: Path) -> Runs:
    """What every rank of a run did; each run is made once."""

    @cache
    def run(name: str) -> list[Outcome]:
        ranks, layout = RUNS[name]
        return run_ranks(ranks, train, corpus, layout, {}, None, None)

    return run


NAMES = [pytest.param(name, marks=pytest.mark.slow if name.startswith("tensor4") else ()) for name in RUNS if name != "one"]


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_rank(runs: Runs, name: str) -> None:
    (truth,) = runs("one")
    assert truth.reports[0].grad_norm > 0.1
    same(runs(name)[-1], truth)


@pytest.mark.parametrize("name", ["tensor2 expert2", "tensor2 slices2", "expert2 slices2", "data2 slices2"])
def test_every_gradient_is_in_the_norm_once(runs: Runs, name: str) -> None:
    """#5916: with expert and tensor parallelism the norm left gradients out; with an expert-tensor degree unlike the tensor degree
    gradients were wrong."""
    for ours in runs(name):
        norm = sum(g.double().square().sum() for g in ours.gradients.values()) ** 0.5
        assert ours.reports[0].grad_norm == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("name", ["data2 slices2", "tensor2 slices2"])
def test_copies_of_an_expert_stay_equal(runs: Runs, name: str) -> None:
    """#1628: slices of experts that several ranks have were not kept in step. Ranks 0 and 1 are one block, 2 and 3 another.

    The optimizer gathers weights, so that copies agree whatever their gradients: they must also be one rank's.
    """
    (truth,) = runs("one")
    first, _, second, _ = runs(name)
    for key, weight in first.weights.items():
        assert torch.equal(weight, second.weights[key]), key
    for copies in (first, second):
        key, difference = worst(copies.weights, truth.weights)
        assert difference < 1e-5, key


def keep_to_four_experts(trainer: Any) -> None:
    """Routers of w, v, -w, -v and zeros that hardly move: both choices are always among the first four experts, for two score above 0."""
    for block in trainer.decoder.blocks.values():
        router = block.experts.router.weight
        router.data[:2] *= 10  # no more: a second choice whose probability underflows ties with the zeros
        router.data[2:4], router.data[4:] = -router.data[:2], 0.0
        router.register_hook(lambda gradient: 1e-6 * gradient)  # far below the optimizer's eps


def idle(place: Place, corpus: Path, layout: Layout) -> Outcome:
    """Without the balancing loss, which would move the zeros."""
    return train_on(
        place, corpus, layout, {"model": little_model(num_experts=8), "auxiliary_loss": 0.0}, steps=4, prepare=keep_to_four_experts
    )


@pytest.mark.parametrize(("ranks", "layout"), [(2, Layout(expert=2)), (4, Layout(expert=2, expert_tensor=2, token_groups=2))])
def test_experts_without_a_token_for_several_steps(corpus: Path, ranks: int, layout: Layout) -> None:
    """The second half of the ranks have only such: their gradients are zeros, their buckets are reduced, their weights decay."""
    (one,), several = run_ranks(1, idle, corpus, Layout()), run_ranks(ranks, idle, corpus, layout)
    for ours in several:
        same(ours, one)
        assert all(share[4:] == [0.0] * 4 for report in ours.reports for share in report.routing.share)
        assert all(g[4:].abs().max() == 0 for name, g in ours.gradients.items() if name.endswith(("gate_up", "down")))


def test_bf16_follows_one_rank(corpus: Path) -> None:
    changes = {"precision": "bf16"}
    one: Outcome = run_ranks(1, train, corpus, Layout(), changes, None, None)[0]
    four: Outcome = run_ranks(4, train, corpus, RUNS["expert2 slices2"][1], changes, None, None)[0]
    for a, b in zip(four.reports, one.reports, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=5e-2)


def late_and_twice(place: Place, corpus: Path, layout: Layout) -> Outcome:
    return train_on(place, corpus, layout, {}, steps=STEPS, late=True, recompute="full")


def test_late_exchanges_and_layers_run_twice_give_the_same_bits(corpus: Path, runs: Runs) -> None:
    """The second run of a layer exchanges again, behind what is still under way."""
    ranks, layout = RUNS["expert2 slices2"]
    early, ours = runs("expert2 slices2")[0], run_ranks(ranks, late_and_twice, corpus, layout)[0]
    assert [r.loss for r in early.reports] == [r.loss for r in ours.reports]
    for name, gradient in early.gradients.items():
        assert torch.equal(gradient, ours.gradients[name]), name


def scored(place: Place, corpus: Path, layout: Layout) -> Any:
    """Three held-out rows."""
    with session(layout=layout, place=place) as joined:
        from data.dataset import TokenDataset
        from minimax_train.engine.trainer import Trainer
        from minimax_train.train.validate import score, validation_rows

        rows = validation_rows(TokenDataset.open(str(corpus / "validation")), 64, 600)[:3]
        assert len(rows) == 3
        return score(Trainer(little_plan(corpus, model=hybrid(), layout=layout), joined), rows)


def test_held_out_rows_that_ranks_do_not_share_evenly(corpus: Path) -> None:
    """The last row's experts are on a rank that has no row left."""
    (one,), two = run_ranks(1, scored, corpus, Layout()), run_ranks(2, scored, corpus, Layout(expert=2))
    for ours in two:
        assert ours.loss == pytest.approx(one.loss, rel=1e-6)
        assert (ours.predicted_tokens, ours.routing.share) == (one.predicted_tokens, one.routing.share)


def test_what_the_ranks_cannot_share_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"layout.expert is 3, which does not divide model.num_experts 4: use a divisor of 4"):
        little_plan(corpus, layout=Layout(expert=3))
    with pytest.raises(ValueError, match=r"layout.expert_tensor is 5, which does not divide model.expert_ffn_size 24: use a divisor of 24"):
        little_plan(corpus, layout=Layout(expert_tensor=5))
