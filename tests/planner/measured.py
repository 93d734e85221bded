"""Bytes that training really takes on CPU ranks, to the byte: every allocation and release of torch's CPU allocator, as its profiler sees
them (gloo's and the interpreter's own memory is not torch's, and not here)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minimax_train.engine.session import session
from minimax_train.model.row import Row
from minimax_train.plan import Plan
from parallel.collectives import wait_for_all
from parallel.world import Place, meet

GLOO = "c10d::"
"""In the names of what gloo copies before it reduces, and lets go at some later time. NCCL makes no copies."""
BEFORE, AFTER = "before the second step", "after the second step"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one rank, in bytes."""

    static: int
    """Between two steps: parameters, gradients, optimizer."""
    peak: int
    """The most in the second step (the first makes what later ones find)."""
    busiest: float
    """(token, choice) rows that the experts of this rank got, over what they get at balance; mean over its layers and rows."""
    live: tuple[tuple[int, str], ...]
    """The largest allocations that are live at the peak: bytes, and the operator that made them."""


def measure_all(place: Place, plans: list[Plan]) -> list[Measured]:
    """Each plan's first stage, one after the other: starting processes takes longer than training."""
    torch.set_num_threads(1)
    store = meet(place)
    return [_measure(place, store, number, plan) for number, plan in enumerate(plans)]


def _measure(place: Place, store: Any, number: int, plan: Plan) -> Measured:
    """Two steps on rows of made-up tokens, each of them one document."""
    stage = plan.stages[0]
    layout = stage.layout or plan.layout
    settings: dict[str, Any] = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    with session("cpu", layout, place, store=store, number=number) as joined, profile(**settings) as profiler:
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(plan, joined)
        draw = torch.Generator().manual_seed(joined.groups.data.rank())
        rows = [_row(plan, stage.length, draw).cut(layout, joined.groups.context.rank) for _ in range(_count(plan, place.size))]
        busiest: list[float] = []
        for decoder in trainer.decoders:
            decoder.rope_base, decoder.recompute = stage.rope_base, stage.recompute
            for block in decoder.blocks.values():
                block.experts.register_forward_hook(lambda module, given, out: busiest.append(_share(module, out[1], layout)))
        trainer.step(rows, 1e-3)
        groups = joined.groups
        for group in (groups.tensor, groups.world, groups.data_context, groups.expert.group, groups.expert_tensor.group) * 16:
            wait_for_all(group)  # gloo's threads hold on to what they sent last
        with record_function(BEFORE):
            pass
        trainer.step(rows, 1e-3)
        with record_function(AFTER):
            pass
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    return _read(list(_events(results.experimental_event_tree())), sum(busiest) / len(busiest))


def _count(plan: Plan, ranks: int) -> int:
    stage = plan.stages[0]
    return stage.batch_tokens // stage.length // (stage.layout or plan.layout).data(ranks)


def _row(plan: Plan, length: int, draw: torch.Generator) -> Row:
    tokens = torch.randint(plan.model.vocab_size, (length,), generator=draw)
    return Row.of_documents([tokens]).with_labels(tokens.roll(-1))


def _share(module: Any, routing: Any, layout: Any) -> float:
    """This rank's experts' part of the row's choices, 1 at balance."""
    each = len(routing.tokens_per_expert) // layout.expert
    first = module.groups.expert.rank * each
    return float(routing.tokens_per_expert[first : first + each].sum() / routing.tokens_per_expert.sum() * layout.expert)


def _events(tree: Any, operator: str = "") -> Iterator[tuple[int, str, Any]]:
    """(time, the outermost operators' names, the allocation or None for a mark)."""
    for event in tree:
        if event.name in (BEFORE, AFTER):
            yield event.start_time_ns, event.name, None
        elif event.name == "[memory]":
            yield event.start_time_ns, operator, event.typed[1]
        yield from _events(event.children, f"{operator} / {event.name}" if operator else event.name)


def _read(events: list[tuple[int, str, Any]], busiest: float) -> Measured:
    events.sort(key=lambda event: event[0])
    live: dict[int, tuple[int, str]] = {}
    held = static = peak = 0
    inside, at_peak = False, list[tuple[int, str]]()
    for _, name, allocation in events:
        if allocation is None:
            inside, static = name == BEFORE, held if name == BEFORE else static
            peak = max(peak, held)
            continue
        size, pointer = allocation.alloc_size, allocation.ptr
        if size > 0 and GLOO not in name:
            live[pointer] = size, name
            held += size
        elif size < 0 and pointer in live:
            held -= live.pop(pointer)[0]
        if inside and held > peak:
            peak, at_peak = held, sorted(live.values(), reverse=True)[:60] if held > 1.02 * peak else at_peak
    return Measured(static=static, peak=peak, busiest=busiest, live=tuple(at_peak))
