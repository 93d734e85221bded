"""Experts over ranks: rows travel to the ranks that hold their experts, and what becomes of them travels back.

    dispatch   all-to-all over the expert ranks: only rows that exist, so splits are uneven and nothing is dropped
    gather     all-gather over the expert-tensor ranks, each filled up to the most that one of them has
    compute    the local experts on rows sorted by expert; an expert-tensor rank has a slice of them, so its outputs are summands
    scatter    all-to-all over the expert-tensor ranks: summands go to the rank the rows came from, which adds them in rank order, in fp32
    combine    all-to-all over the expert ranks, back to where the tokens are

Tokens go in groups, and a group's exchanges overlap with another's compute. Gradients take the same way: they are dispatched, gathered,
turned into gradients of inputs, scattered and combined; the gradients of weights are computed while the gradients of inputs travel. All
groups are one autograd node, whose forward and backward are each one loop, so that the order of exchanges is the same on all ranks and
a weight's gradient appears once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.expert_plan import MOST_GROUPS, Trip, choose_groups, plan_trips
from parallel.groups import Groups

Kept = tuple[Tensor, ...]
Weights = tuple[Tensor, ...]


class Compute(Protocol):
    """The local experts, on rows `[sum(counts), size]` sorted by expert, `counts` of each. Stateless."""

    def outputs(self, rows: Tensor, counts: Sequence[int], weights: Weights) -> tuple[Tensor, Kept]:
        """The experts' outputs, and what backward needs."""
        ...

    def input_gradient(self, gradient: Tensor, counts: Sequence[int], weights: Weights, kept: Kept) -> tuple[Tensor, Kept]:
        """The gradient of the rows by that of the outputs, and what the weights' gradients need."""
        ...

    def weight_gradients(self, counts: Sequence[int], kept: Kept) -> Weights:
        """The weights' gradients by these rows; zeros for an expert without any."""
        ...


@dataclass(frozen=True, kw_only=True)
class Journey:
    """One layer's tokens on their way: which row goes where, the same in forward and backward."""

    trips: tuple[Trip, ...]
    order: Tensor
    """int64 `[tokens * choices]`: which choice, token first, each row is. Rows are sorted by token group, then by expert; those that the
    router dropped come last."""
    inverse: Tensor
    rows: int
    """The first so many travel."""


class Planning:
    """A journey whose counts travel; `finish` makes it. Call it once, when what needs no counts has been started."""

    def __init__(self, expert_TK: Tensor, experts: int, groups: Groups, token_groups: int, multiple: int) -> None:
        self._expert_TK, self._experts, self._groups = expert_TK, experts, groups
        self._number, self._multiple = token_groups or (0 if groups.expert_block.size > 1 else 1), multiple
        self._tried = self._number or MOST_GROUPS
        chosen, keys = expert_TK.flatten(), _sort_keys(expert_TK, experts, self._tried)
        counts = torch.zeros(self._tried * experts + 1, dtype=torch.int64, device=chosen.device)
        counts.scatter_add_(0, keys, torch.ones_like(chosen))
        self._counts = groups.expert_block.begin_all_gather(counts[:-1], "counts").to_host()
        self._sorted = _sorted(keys) if self._number else None  # while counts travel

    def finish(self) -> Journey:
        """The host waits for the counts, the only figures it waits for."""
        groups, experts = self._groups, self._experts
        ranks = groups.expert_block.size
        everyones = self._counts.finish().view(ranks, self._tried, experts)
        number = self._number or choose_groups(int(everyones.sum()), experts, ranks)
        everyones = everyones.view(ranks, number, self._tried // number, experts).sum(2)
        order, inverse = self._sorted or _sorted(_sort_keys(self._expert_TK, experts, number))
        place, shape = (groups.expert.rank, groups.expert_tensor.rank), (groups.expert.size, groups.expert_tensor.size)
        return Journey(
            trips=tuple(plan_trips(everyones, place, shape, self._multiple)),
            order=order,
            inverse=inverse,
            rows=int(everyones[groups.expert_block.rank].sum()),
        )


def plan_journey(expert_TK: Tensor, experts: int, groups: Groups, *, token_groups: int = 0, multiple: int = 1) -> Planning:
    """Begins to plan where each choice of these tokens goes; all ranks of the block call it together, each with its own tokens.

    `expert_TK` int64 in [0, experts], `experts` for a choice that was dropped. `token_groups`: 0 lets choose_groups decide, from counts
    that all ranks have. One small all-gather of counts and, on a GPU, one copy of them to the host.
    """
    return Planning(expert_TK, experts, groups, token_groups, multiple)


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The stable order of the keys, and its inverse."""
    order = keys.argsort(stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _sort_keys(expert_TK: Tensor, experts: int, groups: int) -> Tensor:
    """`[T * K]`: token group * experts + expert; groups * experts where a choice was dropped. Group i has tokens T i / groups up to
    T (i + 1) / groups, rounded down."""
    tokens, choices = expert_TK.shape
    if groups == 1:
        return expert_TK.flatten()
    starts = [tokens * i // groups for i in range(1, groups)]
    group_T = torch.zeros(tokens, dtype=torch.int64, device=expert_TK.device)
    for start in starts:
        group_T[start:] += 1
    return torch.where(expert_TK == experts, groups * experts, group_T[:, None] * experts + expert_TK).flatten()


def experts_over_ranks(rows: Tensor, weights: Weights, compute: Compute, journey: Journey, groups: Groups) -> Tensor:
    """What the experts of all ranks make of this rank's rows `[journey.rows, size]`, in journey.order; the same shape.

    `weights`: this rank's experts. All ranks of the block call it together.
    """
    result: Tensor = _Experts.apply(rows, compute, journey.trips, groups, *weights)
    return result


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, compute: Compute, trips: tuple[Trip, ...], groups: Groups, *weights: Tensor) -> Tensor:
        kept: list[Kept] = []

        def work(number: int, x: Tensor) -> Tensor:
            y, saved = compute.outputs(x, trips[number].counts, weights)
            kept.append(saved)
            return y

        result = _there_and_back(rows, trips, groups, "", work)
        ctx.save_for_backward(*weights, *(tensor for saved in kept for tensor in saved))
        ctx.compute, ctx.trips, ctx.groups, ctx.weights = compute, trips, groups, len(weights)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        compute: Compute = ctx.compute
        trips: tuple[Trip, ...] = ctx.trips
        tensors = ctx.saved_tensors  # asked for once: a layer that runs again gives them once
        weights, saved = tensors[: ctx.weights], tensors[ctx.weights :]
        each = len(saved) // len(trips)
        for_weights: dict[int, Kept] = {}
        total = _Total(len(trips) > 1)

        def work(number: int, dy: Tensor) -> Tensor:
            kept = saved[number * each : (number + 1) * each]
            dx, for_weights[number] = compute.input_gradient(dy, trips[number].counts, weights, kept)
            return dx

        def meanwhile(number: int) -> None:
            total.add(compute.weight_gradients(trips[number].counts, for_weights.pop(number)))

        d_rows = _there_and_back(d_result, trips, ctx.groups, " gradients", work, meanwhile)
        return d_rows, None, None, None, *total.like(weights)


class _Total:
    """The sum of weight gradients over token groups: in fp32 where there are several."""

    def __init__(self, several: bool) -> None:
        self.several = several
        self.sums: Weights = ()

    def add(self, gradients: Weights) -> None:
        if not self.sums:
            self.sums = tuple(g.to(torch.promote_types(g.dtype, torch.float32)) if self.several else g for g in gradients)
            return
        for total, gradient in zip(self.sums, gradients, strict=True):
            total += gradient

    def like(self, weights: Weights) -> Weights:
        return tuple(total.to(weight.dtype) for total, weight in zip(self.sums, weights, strict=True))


def _there_and_back(
    rows: Tensor,
    trips: Sequence[Trip],
    groups: Groups,
    name: str,
    work: Callable[[int, Tensor], Tensor],
    meanwhile: Callable[[int], None] = lambda number: None,
) -> Tensor:
    """Every group's rows through dispatch, `work` and combine; `meanwhile` runs while the results of `work` travel."""
    results: dict[int, Tensor] = {}
    parts = rows.split([sum(trip.send) for trip in trips])
    travels = [
        _travel(number, part, trip, groups, name, work, meanwhile, results)
        for number, (part, trip) in enumerate(zip(parts, trips, strict=True))
    ]
    _in_step(travels)
    return results[0] if len(trips) == 1 else torch.cat([results[number] for number in range(len(trips))])


def _in_step(travels: Sequence[Iterator[None]]) -> None:
    """Runs the iterators a step each in turn, each turn starting one more, the latest started first.

    So a group's dispatch begins before an earlier group computes, and ends after.
    """
    waiting, under_way = list(reversed(travels)), list[Iterator[None]]()
    while waiting or under_way:
        if waiting:
            under_way.insert(0, waiting.pop())
        under_way = [travel for travel in under_way if next(travel, "over") != "over"]


def _travel(
    number: int,
    rows: Tensor,
    trip: Trip,
    groups: Groups,
    name: str,
    work: Callable[[int, Tensor], Tensor],
    meanwhile: Callable[[int], None],
    results: dict[int, Tensor],
) -> Iterator[None]:
    """One group's way, a step at a time: each step but the last leaves an exchange under way."""
    expert, slices = groups.expert, groups.expert_tensor
    last_is_scatter = slices.size > 1 and expert.size == 1  # `meanwhile` hides the last exchange that is one: no other group might
    pending = expert.begin_all_to_all(rows.contiguous(), trip.send, trip.receive, "dispatch" + name)
    yield
    if slices.size > 1:
        pending = pending.then(lambda x: slices.begin_all_gather(_fill_up(x, trip.widest), "gather" + name))
        yield
        x = torch.cat([part[:length] for part, length in zip(pending.finish(), trip.gathered, strict=True)])
    else:
        x = pending.finish()
    y = _back_to_sources(work(number, _by_expert(x, trip)), trip)
    del x  # not to be held while its results travel
    if slices.size > 1:
        mine = trip.gathered[trip.rank[1]]
        pending = slices.begin_all_to_all(y, trip.gathered, [mine] * slices.size, "scatter" + name)
        del y
        if last_is_scatter:
            meanwhile(number)
        yield
        pending = pending.then(
            lambda summands: expert.begin_all_to_all(_sum(summands, slices.size), trip.receive, trip.send, "combine" + name)
        )
    else:
        pending = expert.begin_all_to_all(y, trip.receive, trip.send, "combine" + name)
    if not last_is_scatter:
        meanwhile(number)
    yield
    results[number] = pending.finish()


def _sum(summands: Tensor, ranks: int) -> Tensor:
    """`[ranks * rows, size]` -> `[rows, size]`, added in fp32 in rank order."""
    each = summands.unflatten(0, (ranks, len(summands) // ranks))
    return each.sum(0, dtype=torch.promote_types(summands.dtype, torch.float32)).to(summands.dtype)


def _fill_up(x: Tensor, length: int) -> Tensor:
    """x and rows of zeros, `length` in all."""
    return x if len(x) == length else torch.cat([x, x.new_zeros((length - len(x), *x.shape[1:]))])


def _by_expert(x: Tensor, trip: Trip) -> Tensor:
    """Rows as they arrive, by source and then expert -> by expert and then source, filled up with zeros."""
    if trip.in_order:
        return x
    by_source = x.split([rows for source in zip(*trip.arriving, strict=True) for rows in source])
    experts, zeros = len(trip.arriving), x.new_zeros((trip.multiple, *x.shape[1:]))
    return torch.cat([part for expert in range(experts) for part in (*by_source[expert::experts], zeros[: trip.fillings[expert]])])


def _back_to_sources(y: Tensor, trip: Trip) -> Tensor:
    """The inverse of _by_expert."""
    if trip.in_order:
        return y
    by_expert = y.split([rows for arriving, filling in zip(trip.arriving, trip.fillings, strict=True) for rows in (*arriving, filling)])
    sources = len(trip.arriving[0])
    return torch.cat([part for source in range(sources) for part in by_expert[source :: sources + 1]])
