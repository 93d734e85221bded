"""What stands on a line of metrics.jsonl: figures by name, made from what a step or a validation brought."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from data.sampler import Bookmark
from minimax_train.checkpoint.record import Progress
from minimax_train.engine.batch import Totals
from minimax_train.engine.routing_report import RoutingReport
from minimax_train.engine.trainer import StepReport
from minimax_train.plan import Stage
from minimax_train.train.resume import RunData


def place_figures(progress: Progress, stage: Stage) -> dict[str, Any]:
    """What every line has."""
    return {
        "step": progress.step,
        "stage": stage.name,
        "tokens": progress.tokens,
        "length": stage.length,
        "rope_base": stage.rope_base,
    }


def step_figures(report: StepReport, sources: Sequence[str]) -> dict[str, Any]:
    """Losses and gradient norms of a step, and what its routers did. Whether it was refused stands elsewhere."""
    return {
        "loss": report.loss,
        "auxiliary_loss": report.auxiliary_loss,
        "context_imbalance": report.imbalance,
        "grad_norm": report.grad_norm,
        "grad_norms": report.grad_norms,
        **part_figures(report, sources),
        **routing_figures(report.routing),
    }


def speed_figures(size: int, seconds: float, flops: float, peak: float | None) -> dict[str, Any]:
    """Of a step of `size` tokens; `peak` in FLOP/s, where it is known."""
    return {
        "tokens_per_second": size / seconds,
        "mfu": None if peak is None else flops / seconds / peak,
        "step_seconds": seconds,
    }


def data_figures(size: int, before: dict[str, Bookmark], after: dict[str, Bookmark], data: RunData) -> dict[str, Any]:
    """What the step's rows held of documents, and what the run has taken of each source so far."""
    pairs = [(before[name], after[name]) for name in after]
    return {
        "packing_efficiency": sum(b.tokens - a.tokens for a, b in pairs) / size,
        "split_documents": sum(b.split - a.split for a, b in pairs),
        "sources": {name: bookmark.tokens for name, bookmark in after.items()},
        "epochs": {name: bookmark.tokens / data.sources[name].token_count for name, bookmark in after.items()},
    }


def validation_figures(result: Totals) -> dict[str, Any]:
    """Of the held-out documents."""
    lengths = {name: part.loss for name, part in result.by_length.items() if part.loss is not None}
    return {
        "validation_loss": result.loss,
        "validation_tokens": result.predicted_tokens,
        "length_loss": lengths,
        "expert_load": result.routing.share,
    }


def routing_figures(routing: RoutingReport) -> dict[str, Any]:
    """The routers' figures of a step: scalars over all layers, and under `router` a list over the layers of each."""
    layers = {
        "entropy": routing.entropy,
        "load_entropy": routing.load_entropy,
        "load_max": routing.largest_load,
        "dropped": routing.dropped,
    }
    return {
        "expert_load_max": max(routing.largest_load),
        "router_entropy": fmean(routing.entropy),
        "dropped_fraction": fmean(routing.dropped),
        "router": {name: [round(value, 5) for value in values] for name, values in layers.items()},
    }


def part_figures(batch: Totals, sources: Sequence[str]) -> dict[str, Any]:
    """Loss and gradient by source and by length of document; what a batch has nothing of is left out."""
    parts = {"source": dict(zip(sources, batch.by_source, strict=True)), "length": batch.by_length}
    return {
        f"{kind}_{figure}": {name: value for name, part in named.items() if (value := getattr(part, figure)) is not None}
        for kind, named in parts.items()
        for figure in ("loss", "gradient")
    }
