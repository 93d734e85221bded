"""Tensor parallelism changes nothing: losses, every gradient, their norm, auxiliary loss, optimizer steps, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batches import TrainingRows
from data.dataset import TokenDataset
from minimax_train.checkpoint.record import Progress, Record
from minimax_train.engine.session import Session, session
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


def gradients(trainer: Any, rows: list[Any], joined: Session) -> dict[str, Tensor]:
    """Whole gradients of one global batch, as the optimizer gets them (per predicted token, summed over all ranks)."""
    from minimax_train.engine.state import _shards

    trainer.model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    trainer._schedule(rows, forward_only=False)
    ranges = {name: slice(start, start + len(shard["param"])) for name, _, shard, start in _shards(trainer.decoder, trainer.optimizer)}
    found = {}
    for name, parameter in trainer.decoder.named_parameters():
        reduced = torch.zeros(parameter.numel())  # a rank has the sum only where its range of the distributed optimizer is
        if name in ranges:
            reduced[ranges[name]] = parameter.main_grad.view(-1)[ranges[name]]
        group = joined.groups.data_context if parameter.__dict__.get("allreduce", True) else joined.groups.expert_data
        found[name] = whole(all_sum(reduced, group).view(parameter.shape), parameter, joined)
    return found


def train(place: Place, corpus: Path, layout: Layout, changes: dict[str, Any], load: Path | None, store: Path | None) -> Any:
    """STEPS steps of 4 rows of 64 tokens: (reports, gradients of the first batch, weights); after `load`, one step."""
    torch.set_num_threads(1)
    plan = little_plan(corpus, model=hybrid(), layout=layout, auxiliary_loss=0.3, **changes)
    with session(layout=layout, place=place) as joined:
        from minimax_train.checkpoint.shelf import verified_record
        from minimax_train.checkpoint.store import save
        from minimax_train.engine.state import model_state, optimizer_state, optimizer_steps
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
            state = model_state(decoder, joined.groups) | optimizer_state(decoder, trainer.optimizer, joined.groups)
            save(store, state, record, joined.groups)
        return reports, first, {name: whole(p.detach(), p, joined) for name, p in decoder.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after STEPS steps: `one` of one rank, `two` of two tensor-parallel ranks."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def one_rank(corpus: Path, saved: Path) -> Any:
    return run_ranks(1, train, corpus, Layout(), {}, None, saved / "one")[0]


@pytest.fixture(scope="module")
def two_ranks(corpus: Path, saved: Path) -> Any:
    return run_ranks(2, train, corpus, Layout(tensor=2), {}, None, saved / "two")


def same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(ours[0], theirs[0], strict=True):
        for name in ("loss", "grad_norm", "auxiliary_loss"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=tolerance), name
        assert (a.predicted_tokens, a.squares) == (b.predicted_tokens, b.squares)
        assert a.expert_share == b.expert_share
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.keys() == other.keys()
        for name, tensor in other.items():
            assert (mine[name] - tensor).norm() < tolerance * tensor.norm(), name


def test_two_ranks_equal_one(one_rank: Any, two_ranks: Any) -> None:
    for ours in two_ranks:
        same(ours, one_rank)


@pytest.mark.parametrize("layout", [Layout(tensor=4), Layout(tensor=2)], ids=["tensor4", "tensor2-data2"])
def test_four_ranks_equal_one(corpus: Path, one_rank: Any, layout: Layout) -> None:
    same(run_ranks(4, train, corpus, layout, {}, None, None)[3], one_rank)


@pytest.mark.parametrize(("saved_as", "layout", "ranks"), [("two", Layout(), 1), ("two", Layout(), 2), ("one", Layout(tensor=2), 2)])
def test_checkpoint_of_another_layout(
    corpus: Path, saved: Path, one_rank: Any, two_ranks: Any, saved_as: str, layout: Layout, ranks: int
) -> None:
    """The next step, weights and moments included, is the one that the run which saved takes itself."""
    own = {"one": (Layout(), 1), "two": (Layout(tensor=2), 2)}
    truth = run_ranks(own[saved_as][1], train, corpus, own[saved_as][0], {}, saved / saved_as, None)[0]
    same(run_ranks(ranks, train, corpus, layout, {}, saved / saved_as, None)[0], truth)


def test_bf16_follows_one_rank(corpus: Path) -> None:
    changes = {"precision": "bf16"}
    one, two = (
        run_ranks(1, train, corpus, Layout(), changes, None, None)[0],
        run_ranks(2, train, corpus, Layout(tensor=2), changes, None, None)[0],
    )
    for a, b in zip(two[0], one[0], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=5e-2)
