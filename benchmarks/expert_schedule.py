"""The order in which parallel/experts.py exchanges and computes, asked of the code itself, and how long it lasts on a GPU's streams.

`record` runs the real forward and backward with stand-ins for channels and experts that note what they are told. `play` gives each noted
exchange and product a duration and plays them: one compute stream, one stream for each channel, all serial, and a host that is never the
slowest. An exchange starts when its stream is free and what it sends is computed; where it is finished the compute stream waits for it.
What follows an exchange by `then` (parallel/collectives.py) does so on a stream of that exchange's channel, and compute waits for neither.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from parallel.expert_plan import plan_trips
from parallel.experts import Journey, experts_over_ranks

COMPUTE, EXPERT, SLICES = "compute", "expert", "expert tensor"
ROWS = 4
"""Of a rank, token group and expert; any number, all equal."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What the code did next."""

    kind: Literal["begin", "finish", "work", "join"]
    """join: compute waits for `waits`, which began nothing."""
    name: str
    """Of the exchange, or of the product."""
    number: int
    """Of those of this kind and name, from 0: the token group."""
    stream: str
    rows: int = 0
    """That a begin sends to others, or that work computes."""
    waits: str = COMPUTE
    """The stream that a finish makes wait, and that a begin waits for."""


class Recorder:
    """Stands for a Channel of `size` ranks: notes, and delivers zeros."""

    def __init__(self, stream: str, size: int, log: list[Event]) -> None:
        self.stream, self.rank, self.size, self.log = stream, 0, size, log

    def note(self, kind: Any, name: str, rows: int = 0) -> None:
        number = sum(e.kind == kind and e.name == name for e in self.log)
        self.log.append(Event(kind=kind, name=name, number=number, stream=self.stream, rows=rows))

    def begin_all_gather(self, x: Tensor, name: str) -> Any:
        return self._begin(x.new_zeros((self.size, *x.shape)), name, len(x) * (self.size - 1))

    def begin_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], name: str) -> Any:
        return self._begin(x.new_zeros((sum(receive), *x.shape[1:])), name, sum(send) - send[self.rank])

    def _begin(self, result: Tensor, name: str, rows: int) -> Any:
        if self.size > 1:  # with one rank nothing is sent
            self.note("begin", name, rows)

        def finish() -> Tensor:
            if self.size > 1:
                self.note("finish", name)
            return result

        def then(following: Callable[[Tensor], Any]) -> Any:
            start = len(self.log)
            pending = following(finish())
            if self.size == 1:
                return pending
            self.log[start:] = [replace(event, waits=f"after {self.stream}") for event in self.log[start:]]
            if self.log[-1].kind == "begin":
                return pending  # whoever finishes it has waited for all

            def join() -> Tensor:
                self.log.append(Event(kind="join", name="", number=0, stream=COMPUTE, waits=f"after {self.stream}"))
                arrived: Tensor = pending.finish()
                return arrived

            return SimpleNamespace(finish=join)

        return SimpleNamespace(finish=finish, then=then)


class Products:
    """Stands for the experts: a parallel.experts.Compute that notes, and returns zeros."""

    def __init__(self, log: list[Event]) -> None:
        self.recorder = Recorder(COMPUTE, 1, log)

    def outputs(self, rows: Tensor, counts: Sequence[int], weights: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.recorder.note("work", "outputs", len(rows))
        return rows * 0, (rows,)

    def input_gradient(
        self, gradient: Tensor, counts: Sequence[int], weights: tuple[Tensor, ...], kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.recorder.note("work", "input gradient", len(gradient))
        return gradient * 0, (gradient,)

    def weight_gradients(self, counts: Sequence[int], kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.recorder.note("work", "weight gradients", len(kept[0]))
        return (torch.zeros(1),)


def record(expert: int, slices: int, groups: int) -> tuple[list[Event], list[Event]]:
    """(forward, backward) of rank 0 of expert * slices, evenly routed, one expert for each expert rank."""
    counts = torch.full((expert * slices, groups, expert), ROWS)
    trips = tuple(plan_trips(counts, (0, 0), (expert, slices), 1))
    journey = Journey(trips=trips, order=torch.empty(0), inverse=torch.empty(0), rows=groups * expert * ROWS)
    log: list[Event] = []
    channels: Any = SimpleNamespace(expert=Recorder(EXPERT, expert, log), expert_tensor=Recorder(SLICES, slices, log))
    rows, weight = torch.zeros(journey.rows, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    out = experts_over_ranks(rows, (weight,), Products(log), journey, channels)
    forward = len(log)
    out.sum().backward()
    return log[:forward], log[forward:]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one pass, in units of its compute."""

    exchange: float
    """All exchanges together, one after the other."""
    slices: float = 0.0
    """The share of that in the exchanges between expert-tensor ranks."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One thing that ran: its stream, from when to when, and the event that began it."""

    event: Event
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Played:
    """A pass on the streams."""

    bars: tuple[Bar, ...]
    span: float
    """From the first begin until the compute stream has everything."""

    def lasted(self, *, compute: bool) -> float:
        return sum(bar.end - bar.start for bar in self.bars if (bar.event.stream == COMPUTE) == compute)

    @property
    def hidden(self) -> float:
        """(exchange + compute - span) / exchange: the share of exchange that lay under compute, or under another stream's exchange."""
        exchange = self.lasted(compute=False)
        return (exchange + self.lasted(compute=True) - self.span) / exchange


def play(events: Sequence[Event], costs: Costs) -> Played:
    """The recorded events on the streams. ValueError where costs and events do not fit."""
    per_row = _per_row(events, costs)
    free = {COMPUTE: 0.0}
    ends: dict[tuple[str, int], float] = {}
    bars = []
    for event in events:
        key = event.name, event.number
        if event.kind == "join":
            free[COMPUTE] = max(free[COMPUTE], free[event.waits])
            continue
        if event.kind == "finish":
            free[event.waits] = max(free.get(event.waits, 0.0), ends.pop(key))
            continue
        start = max(free.get(event.waits, 0.0), free.get(event.stream, 0.0))
        free[event.stream] = start + event.rows * per_row[event.stream]
        bars.append(Bar(event=event, start=start, end=free[event.stream]))
        if event.kind == "begin":
            ends[key] = free[event.stream]
    if ends:
        raise ValueError(f"{sorted(ends)} were begun and never finished; play whole passes")
    return Played(bars=tuple(bars), span=free[COMPUTE])


def _per_row(events: Sequence[Event], costs: Costs) -> dict[str, float]:
    """What a row costs on each stream. The gradients of inputs and those of weights cost the same: as many FLOPs."""
    rows: dict[str, int] = {}
    for event in events:
        rows[event.stream] = rows.get(event.stream, 0) + event.rows
    if (SLICES in rows) != (costs.slices > 0) or (EXPERT in rows) != (costs.slices < 1):
        raise ValueError(f"a share of {costs.slices} between expert-tensor ranks, but the events are on streams {sorted(rows)}")
    time = {COMPUTE: 1.0, EXPERT: costs.exchange * (1 - costs.slices), SLICES: costs.exchange * costs.slices}
    return {stream: time[stream] / number for stream, number in rows.items()}
