"""Tensor parallelism changes nothing: losses, every gradient, their norm, auxiliary loss, optimizer steps, checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.batches import TrainingRows
from data.dataset import TokenDataset
from minimax_train.checkpoint.record import Progress, Record
from minimax_train.engine.session import Session, session
from minimax_train.model.decoder import Row
from minimax_train.train.resume import Opening, restore
from minimax_train.train.rows import to_row
from parallel.collectives import all_sum
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.support import little_model, little_plan

STEPS, ROWS = 5, 4


def hybrid() -> Any:
    """8 layers, the last one softmax; 4 heads and 4 key-value heads, so that 4 ranks have one each."""
    return little_model(num_layers=8, pattern=("lightning",) * 7 + ("softmax",), num_key_value_heads=4)


def whole(tensor: Tensor, like: Tensor, joined: Session) -> Tensor:
    """A rank's tensor of the shape of parameter `like` -> the whole parameter's."""
    from minimax_train.model.parts import cut_axis

    axis, group = cut_axis(like), joined.groups.tensor
    if axis is None:
        return tensor.float().clone()
    pieces = torch.zeros(group.size(), *tensor.shape)
    pieces[group.rank()] = tensor
    return torch.cat(all_sum(pieces, group).unbind(), axis)


def gathered(trainer: Any, joined: Session, pick: Callable[[nn.Parameter, dict[str, Tensor], slice], Tensor]) -> dict[str, Tensor]:
    """Whole tensors from what each rank's optimizer has: pick(parameter, its shard of the state, its range of the flattened parameter)."""
    from minimax_train.engine.state import _shards

    found, shards = {}, {name: (shard, start) for name, _, shard, start in _shards(trainer.decoder, trainer.optimizer)}
    for name, parameter in trainer.decoder.named_parameters():
        mine = torch.zeros(parameter.numel())
        if name in shards:
            shard, start = shards[name]
            place = slice(start, start + len(shard["param"]))
            mine[place] = pick(parameter, shard, place)
        group = joined.groups.data_context if parameter.__dict__.get("allreduce", True) else joined.groups.expert_data
        found[name] = whole(all_sum(mine, group).view(parameter.shape), parameter, joined)
    return found


def held(kind: str, parameter: nn.Parameter, shard: dict[str, Tensor], place: slice) -> Tensor:
    """The optimizer's own state of one kind."""
    return shard[kind]


def gradients(trainer: Any, rows: list[Any], joined: Session) -> dict[str, Tensor]:
    """Whole gradients of one global batch, as the optimizer gets them (per predicted token, summed over all ranks)."""
    trainer.model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    trainer._schedule(rows, forward_only=False)
    return gathered(trainer, joined, lambda parameter, _, place: parameter.main_grad.view(-1)[place])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did; tensors are whole."""

    reports: list[Any]
    gradients: dict[str, Tensor]
    """Of its first batch."""
    weights: dict[str, Tensor]
    """At its end, as the optimizer state."""
    state: dict[str, dict[str, Tensor]]
    loaded: dict[str, dict[str, Tensor]]
    """Optimizer state before the first step; empty where nothing was loaded."""


def train(place: Place, corpus: Path, layout: Layout, changes: dict[str, Any], load: Path | None, store: Path | None) -> Outcome:
    """STEPS steps of 4 rows of 64 tokens; after `load`, one step."""
    torch.set_num_threads(1)
    plan = little_plan(corpus, model=hybrid(), layout=layout, auxiliary_loss=0.3, **changes)
    with session(layout=layout, place=place) as joined:
        from minimax_train.checkpoint.shelf import verified_record
        from minimax_train.checkpoint.store import save
        from minimax_train.engine.state import MOMENTS, model_state, optimizer_state, optimizer_steps
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(plan, joined, bucket_size=5000)
        assert min(len(trainer.model.bucket_groups), len(trainer.model.expert_parallel_bucket_groups)) > 3
        done, steps = 0, STEPS
        if load is not None:
            restore(trainer, Opening(checkpoint=load, record=verified_record(load), resumed=True, notes=[]), plan)
            done, steps = STEPS, 1
        source, data = TrainingRows(TokenDataset.open(plan.data.train), seed=1, length=64), joined.groups.data

        def rows(step: int) -> list[Any]:
            return [to_row(source.row(step * ROWS + i), joined) for i in range(data.rank(), ROWS, data.size())]

        def state() -> dict[str, dict[str, Tensor]]:
            return {kind: gathered(trainer, joined, partial(held, kind)) for kind in MOMENTS}

        loaded = {} if load is None else state()
        first = gradients(trainer, rows(done), joined)
        reports = [trainer.step(rows(step), 2e-3) for step in range(done, done + steps)]
        trainer.settle()
        decoder = trainer.decoder
        if store is not None:
            record = Record(
                model=plan.model,
                rope_base=1e4,
                max_positions=64,
                precision=plan.precision,
                progress=Progress(step=done + steps),
                optimizer_steps=optimizer_steps(trainer.optimizer),
            )
            sharded = model_state(decoder, joined.groups) | optimizer_state(decoder, trainer.optimizer, joined.groups)
            save(store, sharded, record, joined.groups)
        weights = {name: whole(p.detach(), p, joined) for name, p in decoder.named_parameters()}
        return Outcome(reports=reports, gradients=first, weights=weights, state=state(), loaded=loaded)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after STEPS steps, under the number of ranks that wrote them."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def one_rank(corpus: Path, saved: Path) -> Outcome:
    outcome: Outcome = run_ranks(1, train, corpus, Layout(), {}, None, saved / "1")[0]
    return outcome


@pytest.fixture(scope="module")
def two_ranks(corpus: Path, saved: Path) -> list[Outcome]:
    return run_ranks(2, train, corpus, Layout(tensor=2), {}, None, saved / "2")


@pytest.fixture(scope="module")
def four_ranks(corpus: Path, saved: Path) -> Outcome:
    """Tensor 2, data 2, so that a rank has parts of rows of the weights that are cut along their columns."""
    outcome: Outcome = run_ranks(4, train, corpus, Layout(tensor=2), {}, None, saved / "4")[3]
    return outcome


def same(ours: Outcome, theirs: Outcome, tolerance: float = 1e-5) -> None:
    for a, b in zip(ours.reports, theirs.reports, strict=True):
        for name in ("loss", "grad_norm", "auxiliary_loss"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=tolerance), name
        assert (a.predicted_tokens, a.squares, a.expert_share) == (b.predicted_tokens, b.squares, b.expert_share)
    for mine, other in ((ours.gradients, theirs.gradients), (ours.weights, theirs.weights)):
        assert mine.keys() == other.keys()
        for name, tensor in other.items():
            assert (mine[name] - tensor).norm() < tolerance * tensor.norm(), name


def test_two_ranks_equal_one(one_rank: Outcome, two_ranks: list[Outcome]) -> None:
    assert one_rank.reports[0].grad_norm > 0.1
    for ours in two_ranks:
        same(ours, one_rank)


def test_tensor_and_data_parallel_equal_one(one_rank: Outcome, four_ranks: Outcome) -> None:
    same(four_ranks, one_rank)


def test_a_head_a_rank_equals_one(corpus: Path, one_rank: Outcome) -> None:
    same(run_ranks(4, train, corpus, Layout(tensor=4), {}, None, None)[3], one_rank)


@pytest.mark.parametrize(("writer", "layout", "ranks"), [("4", Layout(), 1), ("2", Layout(), 2), ("1", Layout(tensor=2), 2)])
def test_checkpoint_of_another_layout(
    corpus: Path, saved: Path, one_rank: Outcome, two_ranks: list[Outcome], four_ranks: Outcome, writer: str, layout: Layout, ranks: int
) -> None:
    """Weights and moments come back to the bit, and the next step is the one that the layout which saved them takes."""
    wrote = {"1": one_rank, "2": two_ranks[0], "4": four_ranks}[writer]
    ours = run_ranks(ranks, train, corpus, layout, {}, saved / writer, None)[0]
    for kind, tensors in wrote.state.items():
        assert all(torch.equal(ours.loaded[kind][name], tensor) for name, tensor in tensors.items()), kind
    own = Layout() if writer == "1" else Layout(tensor=2)
    same(ours, run_ranks(int(writer), train, corpus, own, {}, saved / writer, None)[0])


def test_bf16_follows_one_rank(corpus: Path) -> None:
    changes = {"precision": "bf16"}
    one: Outcome = run_ranks(1, train, corpus, Layout(), changes, None, None)[0]
    two: Outcome = run_ranks(2, train, corpus, Layout(tensor=2), changes, None, None)[0]
    for a, b in zip(two.reports, one.reports, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=5e-2)


def logits_and_losses(place: Place, layout: Layout, fp32_head: bool) -> tuple[Tensor, Tensor]:
    """Of one row of two documents."""
    with session(layout=layout, place=place) as joined:
        from minimax_train.engine.stage import bare, build_stage

        decoder = bare(build_stage(hybrid(), joined, seed=3, fp32_head=fp32_head))
        row = Row.of_documents([torch.arange(20), torch.arange(100, 144)])
        with torch.no_grad():
            return decoder.logits(row), decoder(replace(row, labels=(row.tokens + 7) % 300))[0]


@pytest.mark.parametrize("fp32_head", [False, True])
def test_every_rank_has_all_logits_and_losses(fp32_head: bool) -> None:
    truth, truth_losses = run_ranks(1, logits_and_losses, Layout(), fp32_head)[0]
    for logits, losses in run_ranks(2, logits_and_losses, Layout(tensor=2), fp32_head):
        assert (logits - truth).norm() < 1e-5 * truth.norm()
        assert (losses - truth_losses).norm() < 1e-5 * truth_losses.norm()


def test_what_the_ranks_cannot_share_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"layout.tensor is 4, which does not divide model.num_key_value_heads 2: use a divisor of 2"):
        little_plan(corpus, layout=Layout(tensor=4))
    with pytest.raises(ValueError, match=r"layout.tensor is 2, which does not divide model.vocab_size 301: use a divisor of 1"):
        little_plan(corpus, model=little_model(vocab_size=301), layout=Layout(tensor=2))
    with pytest.raises(ValueError, match=r"stage '64': length is 64, not a multiple of 3"):
        little_plan(corpus, model=little_model(num_attention_heads=6, num_key_value_heads=3), layout=Layout(tensor=3))
