"""Three ways to send lightning states between context ranks. All give the sum of `states.py`; lam^L = exp(-s L) over a piece of L tokens.

gather      every rank gets all states and sums what it needs: one step                                     2 (CP-1) states a rank sends
transpose   each rank gets some rows of all states, sums over the pieces, sends results back: two steps     4 (CP-1)/CP
pruned      a state goes to the next piece; rows of the heads whose decay over a piece is not 0.0 go to     (CP-1)/CP (2 + ~4 f)
            a scan for the pieces behind that one; nothing crosses a document start                         f: share of such heads

These are for one document; with several pruned sends less. Which of them sends least is counted for each row (`Cheapest`).

Each is `begin`, which starts it, and `finish`. `states` are this rank's `[slots, H, D, D]`, in the dtype of states (fp32), 0 in the slots
that are no sources; the result is what enters its pieces, 0 in the slots that are no targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel.collectives import Channel, Pending
from parallel.state_tables import Needed, Transposed, cuts, entering, in_order, needed, reach, transposed
from parallel.states import Flow

FORWARD, BACK = "states", "states back"
"""Names under which a Channel counts the two steps."""


class Exchange(Protocol):
    """One way to send states; every rank of the channel calls both, in one order."""

    def begin(self, states: Tensor, flow: Flow, channel: Channel) -> Pending:
        """Starts it."""
        ...

    def finish(self, pending: Pending, states: Tensor, flow: Flow, channel: Channel) -> Tensor:
        """What enters this rank's pieces."""
        ...

    def numbers_sent(self, flow: Flow, heads: int, size: int) -> int:
        """Of states `[slots, heads, size, size]`, what all ranks together send to others; the mirrored flow sends as much."""
        ...


@dataclass(frozen=True, kw_only=True)
class Gather:
    """LASP-2's: an all-gather."""

    rates_H: Tensor
    """-s L, in the states' dtype: a state keeps exp(rate) of itself over a piece."""

    def begin(self, states: Tensor, flow: Flow, channel: Channel) -> Pending:
        return channel.begin_all_gather(states.contiguous(), FORWARD)

    def finish(self, pending: Pending, states: Tensor, flow: Flow, channel: Channel) -> Tensor:
        everyone, me = pending.finish(), channel.rank
        table = flow.once(("gather", me, *_kind(states)), lambda: reach(flow, in_order(flow), flow.held[me][: len(states)], states))
        return entering(everyone.flatten(0, 1).flatten(2), self.rates_H, table).view_as(states)

    def numbers_sent(self, flow: Flow, heads: int, size: int) -> int:
        return (len(flow.held) - 1) * len(flow.owners) * heads * size * size


@dataclass(frozen=True, kw_only=True)
class Transpose:
    """Sums over pieces, cut over ranks by the states' rows. All slots are sent, whether they hold a state or not."""

    rates_H: Tensor

    def begin(self, states: Tensor, flow: Flow, channel: Channel) -> Pending:
        tables = self._tables(states, flow, channel)
        return channel.begin_all_to_all(_rows(states).index_select(0, tables.send), tables.sent, tables.received, FORWARD)

    def finish(self, pending: Pending, states: Tensor, flow: Flow, channel: Channel) -> Tensor:
        tables, size, pieces = self._tables(states, flow, channel), states.shape[-1], len(flow.owners)
        low, high = cuts(states.shape[1] * size, channel.size)[channel.rank]
        total = entering(pending.finish().view(pieces, high - low, size), _by_row(self.rates_H, size)[low:high], tables.reach)
        back = channel.begin_all_to_all(total.flatten(0, 1), tables.received, tables.sent, BACK).finish()
        return torch.empty_like(_rows(states)).index_copy_(0, tables.send, back).view_as(states)

    def numbers_sent(self, flow: Flow, heads: int, size: int) -> int:
        return 2 * (len(flow.held) - 1) * len(flow.owners) * heads * size * size // len(flow.held)

    def _tables(self, states: Tensor, flow: Flow, channel: Channel) -> Transposed:
        return flow.once(("transpose", channel.rank, *_kind(states)), lambda: transposed(flow, channel.rank, states))


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Only what can still matter: decay is static, and where documents begin is known to all ranks."""

    slow: tuple[int, ...]
    """The heads that remember more than one piece."""
    slow_rates: Tensor
    """Theirs."""

    def begin(self, states: Tensor, flow: Flow, channel: Channel) -> Pending:
        if not flow.near and not self._scans(flow):
            return Pending(states.new_empty(0), states, None, late=False)  # no document crosses a border: nobody sends
        tables = self._tables(states, flow, channel)
        return channel.begin_all_to_all(_rows(states).index_select(0, tables.send), tables.sent, tables.received, FORWARD)

    def finish(self, pending: Pending, states: Tensor, flow: Flow, channel: Channel) -> Tensor:
        received, result = pending.finish(), torch.zeros_like(states)
        if not flow.near and not self._scans(flow):
            return result
        tables, size = self._tables(states, flow, channel), states.shape[-1]
        for slot, at in tables.near:
            result[slot] = received[at : at + result[slot].numel() // size].view_as(result[slot])
        if not self._scans(flow):
            return result
        low, high = cuts(len(self.slow) * size, channel.size)[channel.rank]
        given = received.index_select(0, tables.far).view(-1, high - low, size) if high > low else received.new_empty(0, 0, size)
        total = entering(given, _by_row(self.slow_rates, size)[low:high], tables.reach)
        back = channel.begin_all_to_all(total.flatten(0, 1), tables.back_sent, tables.back_received, BACK).finish()
        _rows(result).index_add_(0, tables.back, back)  # each row once, so in one order
        return result

    def numbers_sent(self, flow: Flow, heads: int, size: int) -> int:
        rows = len(self.slow) * size
        widths = [high - low for low, high in cuts(rows, len(flow.held))]
        mine = [flow.owners[piece] for pieces in (flow.far_sources, flow.far_targets) for piece in pieces]
        return (len(flow.near) * heads * size + sum(rows - widths[rank] for rank in mine)) * size

    def _scans(self, flow: Flow) -> bool:
        return bool(self.slow and flow.far_sources)

    def _tables(self, states: Tensor, flow: Flow, channel: Channel) -> Needed:
        return flow.once(("pruned", self.slow, channel.rank, *_kind(states)), lambda: needed(flow, channel.rank, states, self.slow))


@dataclass(frozen=True, kw_only=True)
class Cheapest:
    """For each row the one of `kinds` that sends least, the first of those that send as little: all ranks find the same one."""

    kinds: tuple[Exchange, ...]
    slow: int
    """Heads that remember more than one piece: by their number alone layers differ in what they send."""

    def begin(self, states: Tensor, flow: Flow, channel: Channel) -> Pending:
        return self.chosen(flow, states).begin(states, flow, channel)

    def finish(self, pending: Pending, states: Tensor, flow: Flow, channel: Channel) -> Tensor:
        return self.chosen(flow, states).finish(pending, states, flow, channel)

    def numbers_sent(self, flow: Flow, heads: int, size: int) -> int:
        return min(kind.numbers_sent(flow, heads, size) for kind in self.kinds)

    def chosen(self, flow: Flow, states: Tensor) -> Exchange:
        """Counted once per row for all layers with as many slow heads, on the host."""
        _, heads, size, _ = states.shape
        sent = flow.once(("sent", self.slow, heads, size), lambda: [kind.numbers_sent(flow, heads, size) for kind in self.kinds])
        return self.kinds[sent.index(min(sent))]


def _kind(states: Tensor) -> tuple[object, ...]:
    """What tables depend on besides the row."""
    return *states.shape, states.dtype, states.device


def _rows(states: Tensor) -> Tensor:
    """`[slots * H * D, D]`"""
    return states.view(-1, states.shape[-1])


def _by_row(rates_H: Tensor, size: int) -> Tensor:
    """The rate of every row of a state, `[H * D]`."""
    return rates_H[:, None].expand(-1, size).reshape(-1)


def slow_heads(slopes_H: Sequence[float], length: int, *, cut: float = 104.0) -> tuple[int, ...]:
    """The heads that remember more than a piece of `length` tokens: s * length < `cut`.

    exp(-104) is 0.0 in fp32, denormal numbers included.
    """
    return tuple(head for head, slope in enumerate(slopes_H) if slope * length < cut)


def make_exchange(
    kind: str, slopes_H: Tensor, host_slopes: Sequence[float], length: int, ranks: int, dtype: torch.dtype, *, cut: float = 104.0
) -> Exchange:
    """The exchange `kind` ("auto", "gather", "transpose", "pruned") of one layer, for pieces of `length` tokens and states of `dtype`.

    `slopes_H` fp32 on the states' device, `host_slopes` the same on the host, so that choosing does not make a device wait. One rank
    has no slots: there it is the one that then does nothing.
    """
    rates, slow = -slopes_H.to(dtype) * length, slow_heads(host_slopes, length, cut=cut)
    kinds: dict[str, Exchange] = {
        "gather": Gather(rates_H=rates),
        "transpose": Transpose(rates_H=rates),
        "pruned": Pruned(slow=slow, slow_rates=rates[torch.tensor(slow, dtype=torch.int64, device=rates.device)]),
    }
    if kind != "auto" and kind not in kinds:
        raise ValueError(f"state exchange {kind!r} is unknown; choose auto, gather, transpose or pruned")
    if ranks == 1:
        return kinds["gather"]
    return Cheapest(kinds=tuple(kinds.values()), slow=len(slow)) if kind == "auto" else kinds[kind]
