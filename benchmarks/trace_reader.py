"""What a torch.profiler trace of one rank says of its exchanges: when each was begun and awaited, and what ran meanwhile.

The trace holds "NAME: begin" and "NAME: finish" of parallel.collectives, "gloo:..." from an exchange's start to its end, and annotations
"module: layer 3 output_gate" of the benchmark. A node of the backward pass is named by the module in which its forward ran: both carry
the same sequence number. Times are milliseconds from the beginning of the step.
"""

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULE, NODE, STEP = "module: ", "autograd::engine::evaluate_function: ", "step"
BEGIN, FINISH = ": begin", ": finish"
ALL_TO_ALL, ALL_GATHER = "gloo:all_to_all", "gloo:all_gather"
GATHERING = "c10d::_allgather"
"""The operator inside a begin that gathers."""


@dataclass(frozen=True, kw_only=True)
class Event:
    name: str
    start: float
    end: float
    sequence: int = -1


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One exchange as this rank saw it."""

    name: str
    layer: str
    backward: bool
    hop: int
    """Of those of one name in this layer and direction, from 1."""
    begun: float
    awaited: float
    """When the thread asked for the result."""
    finished: float
    """When the thread had it."""
    end: float
    """Of gloo's work."""
    waited: float
    """Milliseconds between `begun` and `end` in which the thread stood still, for this or another exchange."""
    between: dict[str, float] = field(default_factory=dict)
    """Module or operator -> milliseconds, between begin and finish."""

    @property
    def lasted(self) -> float:
        return self.end - self.begun


class Trace:
    """The main thread's events, and gloo's."""

    def __init__(self, path: Path) -> None:
        whole = json.loads(path.read_text())
        raw = [e for e in whole["traceEvents"] if e["ph"] == "X" and isinstance(e["tid"], int)]
        step = next(e for e in raw if e["name"] == STEP)
        self.origin, self.thread = step["ts"], step["tid"]
        self.clock = (
            whole.get("baseTimeNanoseconds", 0) / 1e6 + self.origin / 1e3
        )  # of the step's beginning: all ranks of a machine have one
        self.events = sorted((self._event(e) for e in raw if e["tid"] == self.thread), key=lambda e: (e.start, -e.end))
        self.gloo = sorted((self._event(e) for e in raw if e["name"] in (ALL_TO_ALL, ALL_GATHER)), key=lambda e: e.start)
        self.modules = [e for e in self.events if e.name.startswith(MODULE)]
        self.waits = [e for e in self.events if e.name.endswith(FINISH)]
        self.nodes = [e for e in self.events if e.name.startswith(NODE)]
        self._starts = [e.start for e in self.events]
        self._module_starts = [e.start for e in self.modules]
        self._forward_of: dict[int, float] = {}
        for event in self.events:  # in time: a forward operator comes before its backward
            if event.sequence >= 0 and not event.name.startswith(NODE):
                self._forward_of.setdefault(event.sequence, event.start)
        self.exchanges = self._exchanges()

    def _event(self, raw: dict[str, Any]) -> Event:
        start = (raw["ts"] - self.origin) / 1e3
        return Event(name=raw["name"], start=start, end=start + raw["dur"] / 1e3, sequence=raw["args"].get("Sequence number", -1))

    def module_before(self, time: float) -> Event | None:
        """The module that began last."""
        place = bisect_right(self._module_starts, time) - 1
        return self.modules[place] if place >= 0 else None

    def label(self, event: Event) -> str:
        """A module's name, a backward node's module, or the operator."""
        if event.name.startswith(MODULE):
            return event.name.removeprefix(MODULE)
        if event.name.startswith(NODE):
            forward = self._forward_of.get(event.sequence)
            module = None if forward is None else self.module_before(forward)
            if module is not None and forward is not None and forward < module.end:
                return f"{module.name.removeprefix(MODULE)}, backward"
            return event.name.removeprefix(NODE).removesuffix("0").removesuffix("Backward") + ", backward"
        return event.name.removeprefix("aten::")

    def waited(self, start: float, end: float) -> float:
        """Milliseconds of this time in which the thread stood still for some exchange."""
        return sum(max(0.0, min(wait.end, end) - max(wait.start, start)) for wait in self.waits)

    def outermost(self, start: float, end: float) -> list[Event]:
        """Events that lie in this time and in no other event of this time."""
        found: list[Event] = []
        for event in self.events[bisect_left(self._starts, start) : bisect_right(self._starts, end)]:
            if event.end <= end and (not found or event.start >= found[-1].end):
                found.append(event)
        return found

    def _works(self) -> dict[Event, Event]:
        """Begin -> gloo's work, which takes up those of a kind in the order in which they are given."""
        begins = [e for e in self.events if e.name.endswith(BEGIN)]
        gathers = [b for b in begins if any(e.name.startswith(GATHERING) for e in self._inside(b))]
        works = {name: [e for e in self.gloo if e.name == name] for name in (ALL_TO_ALL, ALL_GATHER)}
        found = dict(zip([b for b in begins if b not in gathers], works[ALL_TO_ALL], strict=True))
        if gathers:  # else what gloo gathers is somebody else's, the optimizer's say
            found |= zip(gathers, works[ALL_GATHER], strict=True)
        return found

    def _inside(self, event: Event) -> list[Event]:
        """What the thread did from the event's start to its end."""
        return self.events[bisect_left(self._starts, event.start) : bisect_right(self._starts, event.end)]

    def _exchanges(self) -> list[Exchange]:
        waiting: dict[str, list[Event]] = {}
        found: list[Exchange] = []
        works = self._works()
        hops: Counter[tuple[str, str, bool]] = Counter()
        for event in self.events:
            if event.name.endswith(BEGIN):
                waiting.setdefault(event.name.removesuffix(BEGIN), []).append(event)
            elif event.name.endswith(FINISH):
                name = event.name.removesuffix(FINISH)
                begin = waiting[name].pop(0)  # exchanges of one name finish in the order in which they were begun
                node = next((n for n in self.nodes if n.start <= begin.start < n.end), None)
                module = self.module_before(begin.start if node is None else self._forward_of[node.sequence])
                assert module is not None
                layer = module.name.removeprefix(MODULE).split()[1]
                hops[name, layer, node is not None] += 1
                work = works[begin]
                between: Counter[str] = Counter()
                for inner in self.outermost(begin.end, event.start):
                    if not inner.name.endswith((BEGIN, FINISH)):
                        between[self.label(inner)] += inner.end - inner.start  # type: ignore[assignment]
                found.append(
                    Exchange(
                        name=name,
                        layer=layer,
                        backward=node is not None,
                        hop=hops[name, layer, node is not None],
                        begun=begin.start,
                        awaited=event.start,
                        finished=event.end,
                        end=work.end,
                        waited=self.waited(begin.start, work.end),
                        between=dict(between.most_common()),
                    )
                )
        left = {name: len(events) for name, events in waiting.items() if events}
        if left:
            raise ValueError(f"exchanges were begun and not finished in the trace: {left}; trace whole steps")
        return sorted(found, key=lambda e: e.begun)


def slim(path: Path, shortest: float) -> bytes:
    """The trace with what this file reads, and operators of at least `shortest` milliseconds."""
    whole = json.loads(path.read_text())

    def keeps(e: dict[str, Any]) -> bool:
        if e["ph"] != "X":
            return e["ph"] == "M"
        return e.get("cat") == "user_annotation" or e["name"].startswith((NODE, "gloo:")) or e["dur"] >= 1e3 * shortest

    whole["traceEvents"] = [e for e in whole["traceEvents"] if keeps(e)]
    for name in ("distributedInfo", "host_name", "traceName", "trace_id"):
        whole.pop(name, None)
    return json.dumps(whole, separators=(",", ":")).encode()
