"""Runs of a little model under a layout, with everything they did made whole again: for tests that layouts change nothing."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batches import NOTHING_TO_PREDICT
from data.batches import Row as DataRow
from minimax_train.checkpoint.record import Progress, Record
from minimax_train.engine.session import Session, session
from minimax_train.model.recompute import Recompute
from minimax_train.plan import Optimizer
from minimax_train.train.resume import Opening, restore
from minimax_train.train.rows import to_row
from parallel.collectives import all_sum
from parallel.layout import Layout
from parallel.world import Place
from tests.support import LittleRows, little_model, little_plan

STEPS, ROWS = 3, 4


def hybrid(layers: int = 8, experts: int = 4) -> Any:
    """8 layers or so, the last one softmax; 4 heads and 4 key-value heads, so that 4 ranks have one each.

    Heads of 24: a rank's ranges of the optimizer state begin at multiples of 64 numbers, which then are not rows of out_proj and o_proj.
    """
    return little_model(
        num_layers=layers, pattern=("lightning",) * (layers - 1) + ("softmax",), num_key_value_heads=4, head_dim=24, num_experts=experts
    )


def whole(tensor: Tensor, like: Tensor, joined: Session) -> Tensor:
    """A rank's tensor of the shape of parameter `like` -> the whole parameter's."""
    from minimax_train.model.parts import cuts_of, part_of, whole_shape

    if not cuts_of(like):
        return tensor.float().clone()
    result = torch.zeros(whole_shape(like))
    places = part_of(torch.arange(result.numel()).view(result.shape), cuts_of(like))
    result.view(-1)[places.flatten()] = tensor.float().flatten()
    dense = like.__dict__.get("allreduce", True)
    return all_sum(result, joined.groups.tensor if dense else joined.groups.expert_block.group)


def of_all_stages(held: dict[str, Tensor], joined: Session) -> dict[str, Tensor]:
    """What each pipeline rank has under the names of its layers, together."""
    stages: list[Any] = [None] * joined.groups.pipeline.size()
    dist.all_gather_object(stages, held, group=joined.groups.pipeline)
    assert sum(map(len, stages)) == len({name for stage in stages for name in stage}), "two stages hold one parameter"
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def gathered(trainer: Any, joined: Session, pick: Callable[[nn.Parameter, dict[str, Tensor], slice], Tensor]) -> dict[str, Tensor]:
    """Whole tensors from what each rank's optimizer has: pick(parameter, its shard of the state, its range of the flattened parameter)."""
    from minimax_train.engine.state import shards as optimizer_shards

    found, shards = {}, {name: (shard, start) for name, _, shard, start in optimizer_shards(trainer.decoder, trainer.optimizer)}
    for name, parameter in trainer.decoder.named_parameters():
        mine = torch.zeros(parameter.numel())
        if name in shards:
            shard, start = shards[name]
            place = slice(start, start + len(shard["param"]))
            mine[place] = pick(parameter, shard, place)
        group = joined.groups.data_context if parameter.__dict__.get("allreduce", True) else joined.groups.expert_data
        found[name] = whole(all_sum(mine, group).view(parameter.shape), parameter, joined)
    return of_all_stages(found, joined)


def packed(bounds: Sequence[int], seed: int) -> DataRow:
    """A row of made-up documents of these cu_seqlens."""
    tokens = np.random.default_rng(seed).integers(0, 300, bounds[-1])
    positions = np.concatenate([np.arange(end - start) for start, end in itertools.pairwise(bounds)])
    labels = np.roll(tokens, -1)
    labels[np.array(bounds[1:]) - 1] = NOTHING_TO_PREDICT
    cu_seqlens, nothing = np.array(bounds, np.int32), np.zeros(len(bounds) - 1, np.int64)
    return DataRow(tokens=tokens, labels=labels, positions=positions, cu_seqlens=cu_seqlens, documents=nothing, starts=nothing)


def held(kind: str, parameter: nn.Parameter, shard: dict[str, Tensor], place: slice) -> Tensor:
    """The optimizer's own state of one kind."""
    return shard[kind]


def gradients(trainer: Any, rows: list[Any], joined: Session) -> dict[str, Tensor]:
    """Whole gradients of one global batch, as the optimizer gets them (per predicted token, summed over all ranks)."""
    trainer.zero_gradients()
    trainer.descend(rows)
    return gathered(trainer, joined, lambda parameter, _, place: parameter.main_grad.view(-1)[place])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did; tensors are whole."""

    reports: list[Any]
    gradients: dict[str, Tensor]
    """Of its first batch."""
    weights: dict[str, Tensor]
    """At its end."""
    state: dict[str, dict[str, Tensor]]
    """The optimizer's, as it was stored or loaded; empty where neither was done."""


def train(place: Place, corpus: Path, layout: Layout, changes: dict[str, Any], load: Path | None, store: Path | None) -> Outcome:
    """STEPS steps of 4 rows of 64 tokens, then `store` and one step more; after `load`, that one step."""
    return train_on(place, corpus, layout, changes, load, store, steps=STEPS)


def train_on(
    place: Place,
    corpus: Path,
    layout: Layout,
    changes: dict[str, Any],
    load: Path | None = None,
    store: Path | None = None,
    *,
    steps: int,
    rows_in_batch: int = ROWS,
    packings: Sequence[Sequence[int]] = (),
    late: bool = False,
    recompute: Recompute = "none",
    prepare: Callable[[Any], None] = lambda trainer: None,
) -> Outcome:
    """`steps` steps of rows of 64 tokens, or of these packings (cu_seqlens), one a row, in turn.

    With `store` there is one step more after the checkpoint; with `load` there is that one alone.

    `prepare` may change the weights the trainer begins with. The optimizer's eps is 1% of a usual gradient: with the default, 1e-8, Adam
    makes a whole step of the rounding of a gradient that is nearly 0, and a weight in 10,000 differs by 1e-4 after ten steps.
    """
    torch.set_num_threads(1)
    plan = little_plan(corpus, layout=layout, **{"model": hybrid(), "auxiliary_loss": 0.3, "optimizer": Optimizer(eps=1e-5), **changes})
    with session(layout=layout, place=place, late=late) as joined:
        from minimax_train.checkpoint.shelf import verified_record
        from minimax_train.checkpoint.store import save
        from minimax_train.engine.state import MOMENTS, adopt_weights, model_state, optimizer_state, optimizer_steps
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(plan, joined, bucket_size=300 * plan.model.num_layers // layout.chunks)
        if joined.groups.pipeline.rank() == 0:  # megatron-core gives later pipeline ranks one bucket
            for chunk, decoder in zip(trainer.chunks, trainer.decoders, strict=True):
                assert min(len(chunk.bucket_groups), len(chunk.expert_parallel_bucket_groups)) > min(3, len(decoder.blocks))
        for decoder in trainer.decoders:
            decoder.recompute = recompute
        prepare(trainer)
        adopt_weights(trainer.optimizer)
        done = 0
        if load is not None:
            restore(trainer, Opening(checkpoint=load, record=verified_record(load), resumed=True, notes=[]), plan)
            done, steps = STEPS, 1
        source, data = LittleRows(plan.data.train), joined.groups.data
        draw = (lambda sample: packed(packings[sample % len(packings)], sample)) if packings else source.row

        def rows(step: int) -> list[Any]:
            return [to_row(draw(step * rows_in_batch + i), joined) for i in range(data.rank(), rows_in_batch, data.size())]

        def state() -> dict[str, dict[str, Tensor]]:
            return {kind: gathered(trainer, joined, partial(held, kind)) for kind in MOMENTS}

        kept = {} if load is None else state()
        first = gradients(trainer, rows(done), joined)
        reports = [trainer.step(rows(step), 2e-3) for step in range(done, done + steps)]
        decoder = trainer.decoder
        if store is not None:
            trainer.settle()
            kept = state()
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
            reports.append(trainer.step(rows(done + steps), 2e-3))
        trainer.settle()
        weights = of_all_stages({name: whole(p.detach(), p, joined) for name, p in decoder.named_parameters()}, joined)
        return Outcome(reports=reports, gradients=first, weights=weights, state=kept)


@dataclass(frozen=True, kw_only=True)
class Differences:
    """The largest relative ones between two runs: of numbers |a - b| / |b|, of tensors ||a - b|| / ||b||."""

    loss: float
    gradient: float
    gradient_name: str
    grad_norm: float
    auxiliary_loss: float
    weights: float

    @classmethod
    def between(cls, ours: Outcome, theirs: Outcome) -> "Differences":
        def of_reports(name: str) -> float:
            a, b = (np.array([getattr(report, name) for report in outcome.reports]) for outcome in (ours, theirs))
            return float(np.max(np.abs(a - b) / np.abs(b)))  # NaN where any is

        gradient_name, gradient = worst(ours.gradients, theirs.gradients)
        return cls(
            loss=of_reports("loss"),
            gradient=gradient,
            gradient_name=gradient_name,
            grad_norm=of_reports("grad_norm"),
            auxiliary_loss=of_reports("auxiliary_loss"),
            weights=worst(ours.weights, theirs.weights)[1],
        )


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[str, float]:
    """(name, relative difference) of the tensor that differs most; NaN, and any difference from 0, are infinite."""
    assert ours.keys() == theirs.keys()
    found = {name: torch.nan_to_num((ours[name] - tensor).norm() / tensor.norm(), nan=torch.inf).item() for name, tensor in theirs.items()}
    return max(found.items(), key=lambda item: item[1])


def same(ours: Outcome, theirs: Outcome, tolerance: float = 1e-5) -> None:
    """Reports, gradients of the first batch and weights at the end."""
    for a, b in zip(ours.reports, theirs.reports, strict=True):
        assert (a.predicted_tokens, a.squares, a.routing.share) == (b.predicted_tokens, b.squares, b.routing.share)
        assert a.routing.dropped == b.routing.dropped
        assert a.routing.entropy == pytest.approx(b.routing.entropy, rel=tolerance)
    found = Differences.between(ours, theirs)
    for name in ("loss", "grad_norm", "auxiliary_loss"):
        assert getattr(found, name) < tolerance, name
    assert found.gradient < tolerance, found.gradient_name
    assert found.weights < tolerance, worst(ours.weights, theirs.weights)
