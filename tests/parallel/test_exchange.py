"""Exchanges of states by themselves, with the other ranks in one process: how many operations, what broken states break; the late mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.collectives import Channel, Pending
from parallel.exchange import Exchange, make_exchange
from parallel.pieces import cut_row
from parallel.states import Flow, state_flow
from parallel.testing import run_ranks
from parallel.world import Place, joined, meet

HEADS, SIZE = 5, 8
KINDS = ("gather", "transpose", "pruned", "auto")


class Operations(TorchDispatchMode):
    """Counts what torch dispatches, views and copies to the device too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += 1
        return function(*arguments, **(options or {}))


@dataclass(frozen=True)
class Alone:
    """Stands for a Channel: zeros arrive."""

    rank: int
    size: int

    def begin_all_gather(self, x: Tensor, name: str) -> Pending:
        return Pending(x.new_zeros((self.size, *x.shape)), x, None, late=False)

    def begin_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], name: str) -> Pending:
        assert (len(send), len(receive), sum(send)) == (self.size, self.size, len(x))
        return Pending(x.new_zeros((sum(receive), *x.shape[1:])), x, None, late=False)


def exchanged(exchange: Exchange, flow: Flow, rank: int, ranks: int) -> int:
    """Operations of one layer and direction, for a row of which nothing is known yet."""
    channel: Any = Alone(rank, ranks)
    states = torch.zeros(2, HEADS, SIZE, SIZE)
    with Operations() as operations:
        exchange.finish(exchange.begin(states, flow, channel), states, flow, channel)
    return operations.count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [None, 100, 24], ids=["one document", "six pieces each", "a piece and a half each"])
def test_operations_do_not_grow_with_ranks(kind: str, length: int | None) -> None:
    """On a GPU each is a launch, between the states' arrival and the outputs that need them: as many for 8 pieces as for 256."""
    found: dict[int, list[int]] = {}
    for ranks in (4, 32, 128):
        tokens = 2 * ranks * 16
        bounds = (0, *range(length or tokens, tokens, length or tokens), tokens)
        slopes = [20.0, 0.9, 0.3, 1e-3, 0.0]
        exchange = make_exchange(kind, torch.tensor(slopes), slopes, 16, ranks, torch.float32)
        flow = state_flow(cut_row(bounds, ranks))
        found[ranks] = [exchanged(exchange, one, rank, ranks) for one in (flow, flow.mirrored()) for rank in (0, 1, ranks // 2, ranks - 1)]
    assert max(found[128]) <= max(max(found[4]), max(found[32])) <= 60, found


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_worked_out_once(kind: str) -> None:
    """The second layer of a row does no more than its own arithmetic, also where layers have their own slopes."""
    flow = state_flow(cut_row((0, 70, 128), 4))
    layers = [make_exchange(kind, torch.tensor(s), s, 16, 4, torch.float32) for s in ([0.1] * HEADS, [0.2] * HEADS)]
    first, second, third = (exchanged(layer, flow, 1, 4) for layer in (layers[0], layers[1], layers[0]))
    assert first > second == third


def broken(place: Place, kind: str, value: float) -> list[Tensor]:
    """What enters this rank's pieces where the state after piece 0 of 8 holds `value`; documents end in pieces 2 and 5."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    with joined(place, "gloo", meet(place)):
        assert dist.group.WORLD is not None
        channel, flow = Channel(dist.group.WORLD), state_flow(cut_row((0, 20, 45, 64), place.size))
        slopes, held = [0.01] * HEADS, flow.held[place.rank]
        states = torch.stack([torch.full((HEADS, SIZE, SIZE), float(piece + 1) * flow.sources[piece]) for piece in held])
        if 0 in held:
            states[held.index(0), 3, 2, 1] = value
        exchange = make_exchange(kind, torch.tensor(slopes), slopes, 8, place.size, torch.float32)
        result = exchange.finish(exchange.begin(states, flow, channel), states, flow, channel)
        return [result[held.index(piece)] if piece in held else torch.empty(0) for piece in range(8)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_state_breaks_its_document_alone(kind: str, value: float) -> None:
    """It is not lost either: what it enters says so. Sums with weight 0 over all pieces would spread it."""
    ran, clean = (run_ranks(4, broken, kind, number) for number in (value, 2.0))
    whole, usual = ([max((rank[piece] for rank in result), key=len) for piece in range(8)] for result in (ran, clean))
    assert [bool(state.isfinite().all()) for state in whole] == [piece not in (1, 2) for piece in range(8)]
    for piece in (0, 3, 4, 5, 6, 7):
        assert torch.equal(whole[piece], usual[piece])


def two_layers(place: Place, kind: str) -> list[Tensor]:
    """What enters in two layers that remember much in different heads, as many: of one row, then each of a row that none has seen."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    with joined(place, "gloo", meet(place)):
        assert dist.group.WORLD is not None
        channel, pieces = Channel(dist.group.WORLD), cut_row((0, 50, 64), place.size)
        states = torch.randn(2, HEADS, SIZE, SIZE, generator=torch.Generator().manual_seed(place.rank))
        shared, found = state_flow(pieces), []
        for flow_of in (lambda: shared, lambda: state_flow(pieces)):
            for slopes in ([20.0, 20.0, 20.0, 0.1, 0.0], [0.1, 20.0, 0.2, 20.0, 20.0]):
                exchange, flow = make_exchange(kind, torch.tensor(slopes), slopes, 8, place.size, torch.float32), flow_of()
                found.append(exchange.finish(exchange.begin(states, flow, channel), states, flow, channel))
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_layers_share_what_is_known_of_a_row_and_nothing_else(kind: str) -> None:
    for first, second, alone, alone_too in run_ranks(4, two_layers, kind):
        assert torch.equal(first, alone)
        assert torch.equal(second, alone_too)


def late_channel(place: Place) -> list[str]:
    """What a toy exchange sees that reads before the end, and what one is told that writes to what it sends."""
    import torch.distributed as dist

    with joined(place, "gloo", meet(place)):
        assert dist.group.WORLD is not None
        channel, said = Channel(dist.group.WORLD, late=True), []
        for begin in (
            lambda x: channel.begin_all_gather(x, "toy"),
            lambda x: channel.begin_all_to_all(x, [1, 1], [1, 1], "toy"),
        ):
            x = torch.full((2, 3), float(place.rank))
            pending = begin(x)
            said.append("NaN" if pending._result.isnan().all() else "too early")
            said.append(str(pending.finish().flatten(0, -2)[:, 0].tolist()))
            pending = begin(x)
            x[1, 2] += 1
            with pytest.raises(RuntimeError, match="changed between begin and finish") as refusal:
                pending.finish()
            said.append(str(refusal.value))
        return said


def test_late_channels_catch_what_reads_early_and_what_writes() -> None:
    told = "a buffer was changed between begin and finish of the exchange that sends it"
    assert run_ranks(2, late_channel) == [["NaN", "[0.0, 0.0, 1.0, 1.0]", told, "NaN", "[0.0, 1.0]", told]] * 2
