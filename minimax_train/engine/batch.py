"""One batch through megatron-core's schedule, and what all ranks saw of it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minimax_train.engine.routing_report import RoutingReport
from minimax_train.engine.stage import bare
from minimax_train.engine.tally import BUCKETS, FIGURES, Part, Tally, by_length, by_source
from minimax_train.model.config import ModelConfig
from minimax_train.model.row import Row
from parallel.collectives import all_sum
from parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one chunk of this rank's layers saw of one row."""

    layers: range
    routing: Tensor
    """`[layers, experts + 2]`: model.router.Routing.sums, of this rank's tokens alone."""
    auxiliary: Tensor
    """Sum over the layers; this rank's share of the router's unit's, once for each of its rows."""
    loss: Tensor | None
    """Sum over this rank's predicted tokens, fp64; of the chunk that has the head alone. Tensor-parallel ranks have the same."""
    predicted: Tensor | None
    row: Row
    tally: Tally
    """Losses by length of document where the chunk has the head; and, once backward is through, gradients where it has the embedding."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a batch said, over all ranks; every rank knows them."""

    loss: float
    """Mean cross-entropy, nats per predicted token of the global batch."""
    predicted_tokens: int
    squares: int
    """Sum of the documents' squared lengths: what causal attention costs."""
    auxiliary_loss: float
    """Mean over rows and layers; 1 at balance."""
    imbalance: float
    """The busiest context rank's softmax attention over the mean rank's, mean over rows."""
    routing: RoutingReport
    """Of every layer."""
    by_source: list[Part]
    by_length: dict[str, Part]


def run_batch(
    chunks: list[DistributedDataParallel],
    rows: Sequence[Row],
    *,
    coefficient: float,
    unit: dist.ProcessGroup | None = None,
    forward_only: bool,
    counted: int | None = None,
) -> list[Report]:
    """This rank's rows through its chunks of the layers: forward, and backward into the gradient buffers.

    Training rows have one length; forward alone takes any rows, whose shapes then travel ahead of them. `coefficient`: of the auxiliary
    loss. `unit`: ranks whose rows the routers count together; None: each row alone. The reports are this rank's own, of every chunk and of
    the first `counted` rows (None: all).
    """
    ranks, config = chunks[0].config.pipeline_model_parallel_size, chunks[0].config
    missing = -len(rows) % ranks if forward_only and len(chunks) > 1 else 0
    filled = [*rows, *repeat(rows[-1], missing)]  # interleaving goes round in groups of `ranks`; what fills up is not reported
    reports: dict[int, list[Report]] = defaultdict(list)
    config.variable_seq_lengths = forward_only
    get_forward_backward_func()(
        forward_step_func=partial(_forward_step, coefficient=coefficient, unit=unit, reports=reports),
        data_iterator=[iter(filled) for _ in chunks],
        model=chunks,
        num_microbatches=len(filled),
        seq_length=rows[0].pieces.bounds[-1],
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return [report for of_chunk in reports.values() for report in of_chunk[: len(rows) if counted is None else counted]]


def _forward_step(
    rows: Iterator[Row],
    chunk: DistributedDataParallel,
    *,
    coefficient: float,
    unit: dist.ProcessGroup | None,
    reports: dict[int, list[Report]],
) -> tuple[Tensor, Any]:
    """One row through one chunk. The loss is a sum over predicted tokens: megatron-core divides by their global number.

    The auxiliary loss is taken per unit of the routers, and weighs as much as the unit's tokens; here is a share of it.
    The schedule asks the last stage alone for its loss, so that every chunk writes its own report.
    """
    row, decoder = next(rows), bare(chunk)
    weight: float | Tensor = row.predicted
    if unit is not None:
        weight = all_sum(torch.tensor(row.predicted, device=row.tokens.device), unit)
    tally = Tally(row)
    output, routings = chunk(row, coefficient * weight, tally)
    predicted = (row.labels >= 0).sum() if decoder.is_last and row.labels is not None else None  # on this rank
    if decoder.is_last and row.labels is not None:
        tally.losses(output, row.labels)
    reports[id(chunk)].append(
        Report(
            layers=decoder.layers,
            routing=torch.stack([r.sums for r in routings]),
            auxiliary=torch.stack([r.auxiliary_loss.detach() for r in routings]).sum() * (1 if unit is None else unit.size()),
            loss=None if predicted is None else output.detach().double().sum(),
            predicted=predicted,
            row=row,
            tally=tally,
        )
    )
    if predicted is None:
        return output, None
    return output.sum(), lambda total: (total, predicted.to(torch.int), {})


def total(reports: Sequence[Report], config: ModelConfig, groups: Groups, device: torch.device, sources: int = 1) -> Totals:
    """Sums over rows, chunks and ranks: one small collective, in which every figure is counted once.

    Each rank of a row has a share of the auxiliary loss, and tokens of its own that it routes; tensor-parallel ranks have the same losses;
    and what is said of the whole row is the same on all of its ranks. Of the whole row the stage with the head tells.
    """
    ours, rows_ours = float(groups.tensor.rank() == 0), float(groups.tensor_context.rank() == 0)
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    routing = torch.zeros(config.num_layers, config.num_experts + 2, dtype=torch.float64, device=device)
    tally = torch.zeros(sources, BUCKETS, FIGURES, dtype=torch.float64, device=device)
    counted = tally.new_tensor([ours, ours, 1, 1])  # tensor-parallel ranks have the same losses, and embed tokens of their own
    for report in reports:
        routing[report.layers.start : report.layers.stop] += report.routing
        sums[2] += report.auxiliary
        tally[report.row.source] += report.tally.sums * counted
        if report.loss is not None and report.predicted is not None:
            pieces = report.row.pieces
            sums[:2] += torch.stack([report.loss, report.predicted.double()]) * ours
            sums[3:] += sums.new_tensor([pieces.squares, 1, pieces.imbalance()]) * rows_ours
    everything = all_sum(torch.cat([sums, routing.flatten(), tally.flatten()]), groups.world).cpu()
    loss, predicted, auxiliary, squares, rows, imbalance = everything[:6].tolist()
    parts = everything[6 + routing.numel() :].view(tally.shape)
    return Totals(
        loss=loss / max(predicted, 1.0),
        predicted_tokens=int(predicted),
        squares=int(squares),
        auxiliary_loss=auxiliary / rows / config.num_layers,
        imbalance=imbalance / rows,
        routing=RoutingReport.of(everything[6 : 6 + routing.numel()].view(routing.shape), config.experts_per_token),
        by_source=by_source(parts),
        by_length=by_length(parts),
    )
