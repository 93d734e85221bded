"""Experts over ranks against all experts on all tokens, to the byte on the wire and in every order of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_train.engine.session import Session, session
from minimax_train.model.parts import Cut, part_of
from minimax_train.model.swiglu import SwiGLU
from parallel.expert_plan import Trip, choose_groups, plan_trips, rows_sent
from parallel.experts import experts_over_ranks, plan_journey
from parallel.groups import Groups
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place

EXPERTS, CHOICES, HIDDEN, FFN = 8, 2, 16, 16
TOKENS = (13, 1, 24, 6)
"""Of each rank. With one token most groups of a rank are empty."""


def even(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(TOKENS[rank], EXPERTS, generator=generator).topk(CHOICES).indices


def two_idle(rank: int) -> Tensor:
    """The first half of the experts, whose ranks do all the work, but for one of them."""
    return even(rank) % 4 % 3


def one(rank: int) -> Tensor:
    return torch.full((TOKENS[rank], CHOICES), EXPERTS - 1)


def lopsided(rank: int) -> Tensor:
    """Rank 0's tokens to the last experts, the others' mostly to the first."""
    return torch.where(even(rank) < 2, even(rank), (7 - rank) * torch.ones(1, dtype=torch.int64))


def some_dropped(rank: int) -> Tensor:
    """Of rank 1, which has one token, everything; of others every third choice and a whole token."""
    expert = even(rank)
    expert.view(-1)[rank % 2 :: 3] = EXPERTS
    expert[0] = EXPERTS
    return expert


ROUTINGS = (even, two_idle, one, lopsided, some_dropped)


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    shapes = ((EXPERTS, 2 * FFN, HIDDEN), (EXPERTS, HIDDEN, FFN))
    gate_up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in shapes)
    return gate_up, down


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, the choices' weights, and the gradient of y."""
    generator = torch.Generator().manual_seed(1000 + rank)
    x, dy = (torch.randn(TOKENS[rank], HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, torch.rand(TOKENS[rank], CHOICES, generator=generator, dtype=torch.float64), dy


def dense(ranks: int, routing: Any) -> list[tuple[Tensor, ...]]:
    """(y, dx) of each rank, and at the end (d gate_up, d down): every expert on every token, by autograd in fp64."""
    whole = [w.requires_grad_() for w in weights()]
    results = []
    for rank in range(ranks):
        x, p, dy = inputs(rank)
        x.requires_grad_()
        every = torch.stack([F.linear(F.silu(F.linear(x, w[:FFN])) * F.linear(x, w[FFN:]), d) for w, d in zip(*whole, strict=True)], 1)
        every = F.pad(every, (0, 0, 0, 1))  # what was dropped adds nothing
        y = (every.gather(1, routing(rank)[..., None].expand(-1, -1, HIDDEN)) * p[..., None]).sum(1)
        y.backward(dy)
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    grads = tuple(w.grad for w in whole)
    assert all(g is not None for g in grads)
    return [*results, grads]  # type: ignore[list-item]


@dataclass
class Result:
    y: Tensor
    dx: Tensor
    gradients: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]
    """This rank's part of the dense weights' gradients."""
    sent: dict[str, int]
    expected: dict[str, int]


def cuts(groups: Groups) -> list[tuple[Cut, Cut]]:
    expert, slices = groups.expert, groups.expert_tensor
    first = Cut(axis=0, rank=expert.rank, ranks=expert.size)
    return [(first, Cut(axis=axis, rank=slices.rank, ranks=slices.size, matrices=m)) for axis, m in ((1, 2), (2, 1))]


def over_ranks(place: Place, layout: Layout, backend: str, late: bool = False, dtype: torch.dtype = torch.float64) -> list[Result]:
    """Every routing in turn."""
    torch.set_num_threads(1)
    results = []
    with session(layout=layout, place=place, late=late) as joined:
        groups = joined.groups
        for routing in ROUTINGS:
            x, p, dy = (t.to(dtype) for t in inputs(place.rank))
            x.requires_grad_()
            mine = [part_of(w, cut).to(dtype).contiguous().requires_grad_() for w, cut in zip(weights(), cuts(groups), strict=True)]
            channels = (groups.expert, groups.expert_tensor, groups.expert_block)
            for channel in channels:
                channel.bytes.clear()
            expert = routing(place.rank)
            multiple = 8 if backend == "grouped" else 1
            journey = plan_journey(expert, EXPERTS, groups, token_groups=layout.token_groups, multiple=multiple).finish()
            rows = x[journey.order // CHOICES][: journey.rows]
            out = experts_over_ranks(rows, tuple(mine), SwiGLU(backend=backend), journey, groups)
            out = F.pad(out, (0, 0, 0, len(journey.order) - journey.rows))
            y = (out[journey.inverse].view(*expert.shape, -1) * p[..., None]).sum(1)
            y.backward(dy)
            gradients = tuple(w.grad for w in mine)
            parts = tuple(part_of(g, cut) for g, cut in zip(dense(place.size, routing)[-1], cuts(groups), strict=True))
            sent = {name: number for channel in channels for name, number in channel.bytes.items() if number}
            expected = bytes_by_hand(routing, place, layout, x.element_size())
            results.append(Result(y.detach(), x.grad, gradients, parts, sent, expected))  # type: ignore[arg-type]
    return results


def bytes_by_hand(routing: Any, place: Place, layout: Layout, size: int) -> dict[str, int]:
    """What a rank sends to others in forward and backward, from everyone's choices and the formulas of docs/parallelism.md."""
    expert, slices, number = layout.expert, layout.expert_tensor, max(layout.token_groups, 1)
    e, t, each = place.rank // slices, place.rank % slices, EXPERTS // expert

    def rows(source: int, group: int, target: int) -> int:
        tokens = TOKENS[source]
        chosen = routing(source)[tokens * group // number : tokens * (group + 1) // number]
        return int((chosen // each == target).sum())

    total = dict.fromkeys(("dispatch", "gather", "scatter", "combine"), 0)
    for group in range(number):
        received = [sum(rows(source * slices + s, group, e) for source in range(expert)) for s in range(slices)]
        total["dispatch"] += sum(rows(place.rank, group, target) for target in range(expert) if target != e)
        total["gather"] += (slices - 1) * max(received)
        total["scatter"] += sum(received) - received[t]
        total["combine"] += received[t] - rows(place.rank, group, e)
    both = {f"{name}{way}": count * HIDDEN * size for name, count in total.items() if count for way in ("", " gradients")}
    return both | ({"counts": (expert * slices - 1) * number * EXPERTS * 8} if place.size > 1 else {})


def check(results: list[list[Result]], limit: float) -> None:
    for number, routing in enumerate(ROUTINGS):
        *truth, _ = dense(len(results), routing)
        for rank, ours in enumerate(r[number] for r in results):
            pairs = [(ours.y, truth[rank][0]), (ours.dx, truth[rank][1]), *zip(ours.gradients, ours.parts, strict=True)]
            for a, b in pairs:
                assert (a - b).norm() <= limit * b.norm() + 1e-300, (routing.__name__, rank)
            assert ours.sent == ours.expected, (routing.__name__, rank)


@pytest.mark.parametrize("token_groups", [1, 2, 4])
@pytest.mark.parametrize(("expert", "slices"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_outputs_gradients_and_bytes(expert: int, slices: int, token_groups: int) -> None:
    layout = Layout(expert=expert, expert_tensor=slices, token_groups=token_groups)
    check(run_ranks(expert * slices, over_ranks, layout, "loop"), 1e-13 if slices == 1 else 1e-12)


def test_grouped_products_and_their_filling() -> None:
    """Rows filled up to 8 an expert; the products run on a CPU too. Filling is never sent."""
    for ranks, layout in ((4, Layout(expert=2, expert_tensor=2, token_groups=2)), (1, Layout())):
        check(run_ranks(ranks, over_ranks, layout, "grouped", False, torch.float32), 1e-5)


def test_late_exchanges_give_the_same_bits() -> None:
    layout = Layout(expert=2, expert_tensor=2, token_groups=4)
    early, late = (run_ranks(4, partial(over_ranks, late=mode), layout, "loop") for mode in (False, True))
    for a, b in zip(sum(early, []), sum(late, []), strict=True):
        assert all(torch.equal(x, y) for x, y in zip((a.y, a.dx, *a.gradients), (b.y, b.dx, *b.gradients), strict=True))


def test_idle_experts_have_true_zeros() -> None:
    for layout, backend in ((Layout(expert=2, token_groups=2), "loop"), (Layout(expert=2), "grouped")):
        results = run_ranks(2, over_ranks, layout, backend, False, torch.float32)
        idle, busy = (results[rank][ROUTINGS.index(one)] for rank in (0, 1))
        assert all(g.abs().max() == 0 for g in idle.gradients)
        assert all(g[:-1].abs().max() == 0 and g[-1].abs().max() > 0 for g in busy.gradients)
    results = run_ranks(4, over_ranks, Layout(expert=2, expert_tensor=2, token_groups=4), "loop")
    for number, routing in enumerate(ROUTINGS):
        zeros = [all(g.abs().max() == 0 for g in result[number].gradients) for result in results]
        assert zeros == [routing is one, routing is one, routing is two_idle, routing is two_idle]


@dataclass(frozen=True, kw_only=True)
class NotedSwiGLU(SwiGLU):
    made: list[tuple[Tensor, ...]]

    def weight_gradients(self, *arguments: Any) -> Any:
        self.made.append(super().weight_gradients(*arguments))
        return tuple(g.clone() for g in self.made[-1])


def test_gradients_of_groups_are_added_in_fp32(alone: Session) -> None:
    """In bf16: the sum of the groups' own gradients, rounded once."""
    tokens, made = 256, list[tuple[Tensor, ...]]()
    generator = torch.Generator().manual_seed(4)
    chosen = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOICES).indices
    mine = tuple(w.bfloat16().requires_grad_() for w in weights())
    journey = plan_journey(chosen, EXPERTS, alone.groups, token_groups=4).finish()
    rows = torch.randn(journey.rows, HIDDEN, generator=generator).bfloat16().requires_grad_()
    out = experts_over_ranks(rows, mine, NotedSwiGLU(backend="loop", made=made), journey, alone.groups)
    out.backward(torch.randn(out.shape, generator=generator).bfloat16())
    assert len(made) == 4
    for weight, *groups in zip(mine, *made, strict=True):
        exact, step_by_step = sum(g.float() for g in groups), groups[0] + groups[1] + groups[2] + groups[3]
        assert weight.grad is not None
        assert torch.equal(weight.grad, exact.bfloat16())  # type: ignore[union-attr]
        assert not torch.equal(weight.grad, step_by_step)


@dataclass(frozen=True)
class Told:
    """A channel, or what it began, that tells when something begins and ends."""

    channel: Any
    log: list[str]

    @property
    def rank(self) -> int:
        rank: int = self.channel.rank
        return rank

    @property
    def size(self) -> int:
        size: int = self.channel.size
        return size

    def begin_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], name: str) -> Any:
        number = sum(line.startswith(f"begin {name} ") for line in self.log)
        self.log.append(f"begin {name} {number}")
        return _Telling(self.channel.begin_all_to_all(x, send, receive, name), self.log, f"finish {name} {number}")

    def begin_all_gather(self, x: Tensor, name: str) -> Any:
        number = sum(line.startswith(f"begin {name} ") for line in self.log)
        self.log.append(f"begin {name} {number}")
        return _Telling(self.channel.begin_all_gather(x, name), self.log, f"finish {name} {number}")


@dataclass(frozen=True)
class _Telling:
    pending: Any
    log: list[str]
    line: str

    def finish(self) -> Tensor:
        self.log.append(self.line)
        result: Tensor = self.pending.finish()
        return result

    def then(self, following: Callable[[Tensor], Any]) -> Any:
        def noted(arrived: Tensor) -> Any:
            self.log.append(self.line)
            return following(arrived)

        return self.pending.then(noted)


@dataclass(frozen=True, kw_only=True)
class ToldSwiGLU(SwiGLU):
    log: list[str]

    def outputs(self, *arguments: Any) -> Any:
        self.log.append("outputs")
        return super().outputs(*arguments)

    def input_gradient(self, *arguments: Any) -> Any:
        self.log.append("input gradient")
        return super().input_gradient(*arguments)

    def weight_gradients(self, *arguments: Any) -> Any:
        self.log.append("weight gradients")
        return super().weight_gradients(*arguments)


def told(place: Place, layout: Layout) -> tuple[list[str], int, int]:
    """What happened in which order; how often each weight's gradient was accumulated, and how many exchanges of counts there were."""
    log: list[str] = []
    with session(layout=layout, place=place) as joined:
        groups = replace(joined.groups, expert=Told(joined.groups.expert, log), expert_tensor=Told(joined.groups.expert_tensor, log))  # type: ignore[arg-type]
        mine = [part_of(w, cut).contiguous().requires_grad_() for w, cut in zip(weights(), cuts(joined.groups), strict=True)]
        times: list[int] = []
        accumulators = [weight.expand_as(weight).grad_fn.next_functions[0][0] for weight in mine]  # type: ignore[union-attr]
        for accumulator in accumulators:  # what DDP hooks
            accumulator.register_hook(lambda *_: times.append(1))
        journey = plan_journey(even(place.rank), EXPERTS, groups, token_groups=layout.token_groups).finish()
        rows = inputs(place.rank)[0][journey.order // CHOICES].requires_grad_()
        experts_over_ranks(rows, tuple(mine), ToldSwiGLU(backend="loop", log=log), journey, groups).sum().backward()
        return log, len(times), joined.groups.expert_block.calls["counts"]


def test_a_group_travels_while_another_is_computed() -> None:
    logs = run_ranks(2, told, Layout(expert=2, token_groups=3))
    assert logs[0] == logs[1], "one order on all ranks"
    log, accumulated, counted = logs[0]
    assert (accumulated, counted) == (2, 1)
    forward = [
        "begin dispatch 0",
        *("begin dispatch 1", "finish dispatch 0", "outputs", "begin combine 0"),
        *("begin dispatch 2", "finish dispatch 1", "outputs", "begin combine 1", "finish combine 0"),
        *("finish dispatch 2", "outputs", "begin combine 2", "finish combine 1", "finish combine 2"),
    ]
    backward = [f"{line[:-2]} gradients{line[-2:]}" if line[-1].isdigit() else "input gradient" for line in forward]
    for number in range(3):
        backward.insert(backward.index(f"begin combine gradients {number}") + 1, "weight gradients")
    assert log == forward + backward


def test_slices_gather_while_another_group_is_computed() -> None:
    logs = run_ranks(4, told, Layout(expert=2, expert_tensor=2, token_groups=4))
    assert all(log == logs[0] for log in logs)
    log = [line for line in logs[0][0] if "gradient" not in line]
    for group in range(3):
        computed = [i for i, line in enumerate(log) if line == "outputs"]
        assert log.index(f"begin gather {group + 1}") < computed[group] < log.index(f"finish gather {group + 1}")
        assert log.index(f"begin scatter {group}") < computed[group + 1] < log.index(f"finish scatter {group}")
    assert log.index("begin dispatch 2") < computed[0] < log.index("finish dispatch 2")
    assert log.index("begin combine 0") < computed[2] < log.index("finish combine 0")


def chosen_groups(place: Place) -> list[int]:
    """Token groups where ranks have as many tokens as the rule's limits, all together."""
    with session(layout=Layout(expert=2), place=place) as joined:
        made = []
        for rows in (4 * 512 * 2, 4 * 512 * 2 - 2, 2 * 512 * 2, 2 * 512 * 2 - 2):
            mine = rows // 2 - 100 if place.rank else rows - (rows // 2 - 100)  # uneven, and each alone would choose otherwise
            journey = plan_journey(torch.arange(mine)[:, None] % 2, 2, joined.groups).finish()
            assert sum(sum(trip.send) for trip in journey.trips) == mine
            made.append(len(journey.trips))
        return made


def test_ranks_choose_the_same_number_of_groups() -> None:
    assert run_ranks(2, chosen_groups) == [[4, 2, 2, 1]] * 2
    assert choose_groups(10**9, 32, 1) == 1, "nothing travels"


def test_trips_of_text01() -> None:
    """8192 tokens a rank over 8 ranks, spread evenly: 7/8 of 2 x 8192 rows leave, 176 MB in bf16 with 6144 numbers a row."""
    trip = Trip(rank=(3, 0), send=(2048,) * 8, receive=(2048,) * 8, gathered=(16384,), arriving=((512,) * 8,) * 4, multiple=8)
    assert rows_sent(trip) == {"dispatch": 14336, "gather": 0, "scatter": 0, "combine": 14336}
    assert rows_sent(trip)["dispatch"] * 6144 * 2 == 176_160_768
    (made,) = plan_trips(torch.full((8, 1, 32), 512), (3, 0), (8, 1), 8)
    assert made == trip


def test_fillings() -> None:
    (trip,) = plan_trips(torch.tensor([[[3, 0, 8, 1]], [[2, 0, 8, 0]]]), (1, 0), (2, 1), 8)
    assert (trip.arriving, trip.fillings, trip.counts) == (((8, 8), (1, 0)), (0, 7), (16, 8))
    (trip,) = plan_trips(torch.tensor([[[3, 0, 8, 1]], [[2, 0, 8, 0]]]), (0, 0), (2, 1), 8)
    assert (trip.fillings, trip.counts) == ((3, 8), (8, 8)), "an expert without rows has some of zeros"
