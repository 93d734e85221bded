"""Experts over real gloo ranks: bytes counted beside the formulas of docs/parallelism.md, and profiler traces of forward and backward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from expert_schedule import COMPUTE, EXPERT, SLICES, Event
from torch import Tensor
from torch.autograd.profiler import record_function
from trace_reader import BEGIN, FINISH, MODULE, STEP, Trace

from minimax_train.model.swiglu import SwiGLU
from parallel.collectives import wait_for_all
from parallel.experts import Journey, experts_over_ranks, plan_journey
from parallel.groups import Groups
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place

EXPERTS, CHOICES, NUMBER = 8, 2, 4
"""NUMBER: bytes of an fp32."""
LAYER = f"{MODULE}layer 0 "
STEPS, WARM_UP = 3, 2
PRODUCTS = ("outputs", "input gradient", "weight gradients")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer of experts, `tokens` on each rank."""

    expert: int
    slices: int
    groups: int
    tokens: int
    hidden: int
    width: int
    """Of a whole expert."""
    routing: str = "even"
    """ "even": every expert has as many choices in every group; "random": drawn, seed of the rank."""

    @property
    def layout(self) -> Layout:
        return Layout(expert=self.expert, expert_tensor=self.slices, token_groups=self.groups)

    @property
    def ranks(self) -> int:
        return self.expert * self.slices

    def chosen(self, rank: int) -> Tensor:
        """int64 `[tokens, CHOICES]`."""
        if self.routing == "even":
            return (torch.arange(self.tokens * CHOICES) % EXPERTS).view(-1, CHOICES)
        skewed = torch.rand(self.tokens, EXPERTS, generator=torch.Generator().manual_seed(rank)) * torch.linspace(1, 2, EXPERTS)
        return skewed.topk(CHOICES).indices


def by_formula(case: Case) -> list[dict[str, int]]:
    """Bytes that each rank sends to others in forward and backward, from everyone's choices alone."""
    ranks, number, each = range(case.ranks), case.groups, EXPERTS // case.expert
    bounds = [case.tokens * group // number for group in range(number + 1)]
    chosen = [case.chosen(rank) // each for rank in ranks]  # the expert rank that a choice goes to

    def rows(source: int, group: int, target: int) -> int:
        return int((chosen[source][bounds[group] : bounds[group + 1]] == target).sum())

    sent = []
    for rank in ranks:
        e, t = divmod(rank, case.slices)
        total = dict.fromkeys(("dispatch", "gather", "scatter", "combine"), 0)
        for group in range(number):
            received = [sum(rows(source * case.slices + s, group, e) for source in range(case.expert)) for s in range(case.slices)]
            total["dispatch"] += sum(rows(rank, group, target) for target in range(case.expert) if target != e)
            total["gather"] += (case.slices - 1) * max(received)
            total["scatter"] += sum(received) - received[t]
            total["combine"] += received[t] - rows(rank, group, e)
        counts = {"counts": (case.ranks - 1) * number * EXPERTS * 8}
        sent.append({f"{n}{way}": r * case.hidden * NUMBER for n, r in total.items() for way in ("", " gradients")} | counts)
    return sent


def even_bytes(case: Case) -> float:
    """n k h bytes (EP - 1) / EP: a dispatch or combine where choices are even, tokens n, choices k, hidden size h."""
    return case.tokens * CHOICES * case.hidden * NUMBER * (case.expert - 1) / case.expert


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Bytes that ranks 0, 1, ... sent by the channels' own count, and by formula."""

    case: Case
    counted: list[dict[str, int]]
    formula: list[dict[str, int]]

    @property
    def equal(self) -> bool:
        """Every exchange of every rank; and of even choices dispatch and combine also the plain formula."""
        whole = [{name: one.get(name, 0) for name in other} for one, other in zip(self.counted, self.formula, strict=True)]
        named = all(one.keys() <= other.keys() for one, other in zip(self.counted, self.formula, strict=True))
        plain = (one.get(name, 0) == even_bytes(self.case) for one in self.counted for name in ("dispatch", "combine"))
        return named and whole == self.formula and (self.case.routing != "even" or all(plain))


def count(cases: Sequence[Case]) -> list[Counted]:
    """Runs the cases, those of one layout together."""
    sent: dict[Case, list[dict[str, int]]] = {case: [] for case in cases}
    for expert, slices in sorted({(case.expert, case.slices) for case in cases}):
        mine = [case for case in cases if (case.expert, case.slices) == (expert, slices)]
        for result in run_ranks(expert * slices, count_on_rank, mine):
            for case, one in zip(mine, result, strict=True):
                sent[case].append(one)
    return [Counted(case=case, counted=counted, formula=by_formula(case)) for case, counted in sent.items()]


def count_on_rank(place: Place, cases: Sequence[Case]) -> list[dict[str, int]]:
    from minimax_train.engine.session import session

    torch.set_num_threads(1)
    found = []
    with session(layout=cases[0].layout, place=place) as joined:
        channels = (joined.groups.expert, joined.groups.expert_tensor, joined.groups.expert_block)
        for case in cases:
            for channel in channels:
                channel.bytes.clear()
            layer = Layer.of(case, joined.groups, SwiGLU(backend="loop"))
            layer.forward().sum().backward()
            found.append({name: number for channel in channels for name, number in channel.bytes.items()})
    return found


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer's experts get on this rank."""

    rows: Tensor
    weights: tuple[Tensor, ...]
    compute: SwiGLU
    journey: Journey
    groups: Groups

    @classmethod
    def of(cls, case: Case, groups: Groups, compute: SwiGLU) -> "Layer":
        journey = plan_journey(case.chosen(groups.rank), EXPERTS, groups, token_groups=case.groups).finish()
        mine, width = EXPERTS // case.expert, case.width // case.slices
        shapes = ((mine, 2 * width, case.hidden), (mine, case.hidden, width))
        rows = torch.randn(journey.rows, case.hidden, requires_grad=True)
        return cls(rows=rows, weights=_leaves(shapes), compute=compute, journey=journey, groups=groups)

    def forward(self) -> Tensor:
        return experts_over_ranks(self.rows, self.weights, self.compute, self.journey, self.groups)


def _leaves(shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    return tuple((torch.randn(shape) * 0.02).requires_grad_() for shape in shapes)


@contextmanager
def named(name: str) -> Iterator[None]:
    with record_function(LAYER + name):
        yield


@dataclass(frozen=True, kw_only=True)
class Named(SwiGLU):
    """SwiGLU whose products a trace names."""

    backend: str = "loop"

    def outputs(self, *arguments: Any) -> Any:
        with named("outputs"):
            return super().outputs(*arguments)

    def input_gradient(self, *arguments: Any) -> Any:
        with named("input gradient"):
            return super().input_gradient(*arguments)

    def weight_gradients(self, *arguments: Any) -> Any:
        with named("weight gradients"):
            return super().weight_gradients(*arguments)


def trace_on_rank(place: Place, cases: Sequence[Case], folder: Path) -> None:
    """Writes traces `CASE-STEP-RANK.json` of some forward and backward passes of each case."""
    from minimax_train.engine.session import session

    torch.set_num_threads(1)
    with session(layout=cases[0].layout, place=place) as joined:
        for number, case in enumerate(cases):
            layer = Layer.of(case, joined.groups, Named())
            for step in range(-WARM_UP, STEPS):
                wait_for_all(joined.groups.world)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, record_function(STEP):
                    with named("experts"):
                        out = layer.forward()
                    out.backward(torch.ones_like(out))
                if step >= 0:
                    profile.export_chrome_trace(str(folder / f"{number}-{step}-{place.rank}.json"))


def events_in(trace: Trace) -> list[Event]:
    """The order of begins, finishes and products in a trace, as expert_schedule records it (rows left out)."""
    found: list[Event] = []
    for event in trace.events:
        kind = next((k for k, ending in (("begin", BEGIN), ("finish", FINISH)) if event.name.endswith(ending)), "work")
        name = event.name.removeprefix(LAYER).removesuffix(BEGIN).removesuffix(FINISH)
        if kind == "work" and (not event.name.startswith(LAYER) or name not in PRODUCTS):
            continue
        stream = COMPUTE if kind == "work" else SLICES if name.startswith(("gather", "scatter")) else EXPERT
        number = sum(e.kind == kind and e.name == name for e in found)
        found.append(Event(kind=kind, name=name, number=number, stream=stream))  # type: ignore[arg-type]
    return found
