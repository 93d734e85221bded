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
from parallel.world import Place, meet

GLOO = "c10d::"
"""In the names of what gloo copies before it reduces, and lets go at some later time. NCCL makes no copies."""
LASTING = ("Optimizer.step", "LinearWithGradAccumulationAndAsyncCommunication / aten::empty")
"""How the names of what the first step makes for good begin: moments, and megatron-core's buffer of gathered tokens. All else that is still
there after it is a tensor or two that a gloo thread sent and holds on to until it sends another."""
READY, BEFORE, AFTER = "before the first step", "before the second step", "after the second step"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one rank, in bytes."""

    static: int
    """What is there before the second step and still after it: parameters, gradients, optimizer, the batch's rows."""
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
        with record_function(READY):
            pass
        trainer.step(rows, 1e-3)
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
        if event.name in (READY, BEFORE, AFTER):
            yield event.start_time_ns, event.name, None
        elif event.name == "[memory]":
            yield event.start_time_ns, operator, event.typed[1]
        yield from _events(event.children, f"{operator} / {event.name}" if operator else event.name)


def _read(events: list[tuple[int, str, Any]], busiest: float) -> Measured:
    events.sort(key=lambda event: event[0])
    live: dict[int, tuple[int, str, int]] = {}  # by address: bytes, name, time
    before, at_peak = dict(live), list[tuple[int, str]]()
    held = static = peak = ready = 0
    for time, name, allocation in events:
        if name == READY:
            ready = time
        elif name == BEFORE:
            before = {pointer: one for pointer, one in live.items() if one[2] < ready or one[1].startswith(LASTING)}
        elif name == AFTER:
            static = sum(one[0] for pointer, one in before.items() if live.get(pointer) == one)
            break
        elif allocation.alloc_size > 0 and GLOO not in name:
            live[allocation.ptr] = allocation.alloc_size, name, time
            held += allocation.alloc_size
        elif allocation.alloc_size < 0 and allocation.ptr in live:
            held -= live.pop(allocation.ptr)[0]
        if before and held > peak:
            at_peak = [one[:2] for one in sorted(live.values(), reverse=True)[:30]] if held > 1.02 * peak else at_peak
            peak = held
    return Measured(static=static, peak=peak, busiest=busiest, live=tuple(at_peak))
