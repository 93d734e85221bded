"""Three ways to send lightning states between context ranks. All give the sum of `states.py`; lam^L = exp(-s L) over a piece of L tokens.

gather      every rank gets all states and sums what it needs: one step                                     2 (CP-1) states a rank sends
transpose   each rank gets some rows of all states, scans over the pieces, sends results back: two steps    4 (CP-1)/CP
pruned      a state goes to the next piece; rows of the heads whose decay over a piece is not 0.0 go to     (CP-1)/CP (2 + ~4 f)
            a scan for the pieces behind that one; nothing crosses a document start                         f: share of such heads

These are for one document; with several pruned sends less. Which of them sends least is counted for each row (`Cheapest`).

Each is `begin`, which starts it, and `finish`. `states` are this rank's `[slots, H, D, D]`, in the dtype of states (fp32), 0 in the slots
that are no sources; the result is what enters its pieces, 0 in the slots that are no targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel.collectives import Channel, Pending
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

    decay_H: Tensor
    """lam^L, in the states' dtype."""

    def begin(self, states: Tensor, flow: Flow, channel: Channel) -> Pending:
        return channel.begin_all_gather(states.contiguous(), FORWARD)

    def finish(self, pending: Pending, states: Tensor, flow: Flow, channel: Channel) -> Tensor:
        everyone, result = pending.finish(), torch.zeros_like(states)
        place = {piece: (rank, slot) for rank, held in enumerate(flow.held) for slot, piece in enumerate(held)}
        for slot, piece in enumerate(flow.held[channel.rank]):
            if flow.targets[piece]:
                for source in range(flow.first[piece], piece):
                    result[slot] *= self.decay_H[:, None, None]
                    if flow.sources[source]:
                        result[slot] += everyone[place[source]]
        return result

    def numbers_sent(self, flow: Flow, heads: int, size: int) -> int:
        return (len(flow.held) - 1) * len(flow.owners) * heads * size * size


@dataclass(frozen=True, kw_only=True)
class Transpose:
    """A scan over pieces, cut over ranks by the states' rows. All slots are sent, whether they hold a state or not."""

    decay_H: Tensor

    def begin(self, states: Tensor, flow: Flow, channel: Channel) -> Pending:
        slots, heads, size, _ = states.shape
        rows, cuts = states.reshape(slots, heads * size, size), _cuts(heads * size, channel.size)
        parts = [rows[:, low:high] for low, high in cuts]
        mine = parts[channel.rank].numel()
        return channel.begin_all_to_all(_flat(parts), [part.numel() for part in parts], [mine] * channel.size, FORWARD)

    def finish(self, pending: Pending, states: Tensor, flow: Flow, channel: Channel) -> Tensor:
        slots, heads, size, _ = states.shape
        cuts = _cuts(heads * size, channel.size)
        low, high = cuts[channel.rank]
        received = pending.finish().view(channel.size, slots, high - low, size)
        given = {
            piece: received[rank, slot] for rank, held in enumerate(flow.held) for slot, piece in enumerate(held) if flow.sources[piece]
        }
        entering = _scan(given, flow, _rows(self.decay_H, size)[low:high], nearest=True)
        back = [torch.stack([entering.get(piece, torch.zeros_like(received[0, 0])) for piece in held]) for held in flow.held]
        widths = [slots * (high - low) * size for low, high in cuts]
        results = channel.begin_all_to_all(_flat(back), [back[0].numel()] * channel.size, widths, BACK).finish()
        return torch.cat([part.view(slots, -1, size) for part in results.split(widths)], dim=1).view(states.shape)

    def numbers_sent(self, flow: Flow, heads: int, size: int) -> int:
        return 2 * (len(flow.held) - 1) * len(flow.held[0]) * heads * size * size


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Only what can still matter: decay is static, and where documents begin is known to all ranks."""

    decay_H: Tensor
    heads: tuple[int, ...]
    """Those that remember more than one piece."""
    slow: Tensor
    """int64: the same on the states' device."""

    def begin(self, states: Tensor, flow: Flow, channel: Channel) -> Pending:
        me, size, number = channel.rank, states.shape[-1], states[0].numel()
        cuts = _cuts(len(self.slow) * size, channel.size)
        low, high = cuts[me]
        slow = states[:, self.slow].flatten(1, 2)
        slots = {piece: slot for slot, piece in enumerate(flow.held[me])}
        far = [slots[piece] for piece in flow.held[me] if piece in flow.far_sources]
        parts: list[list[Tensor]] = []
        for rank, (first, end) in enumerate(cuts):
            near = [states[slots[p - 1]] for p in flow.held[rank] if p in flow.near and p - 1 in slots]
            parts.append([*near, *(slow[slot, first:end] for slot in far)])
        receive = []
        for rank in range(channel.size):
            near_pieces, far_pieces = self._from(rank, flow, me)
            receive.append(len(near_pieces) * number + len(far_pieces) * (high - low) * size)
        if not flow.near and not self._scans(flow):
            return Pending(states.new_empty(0), states, None, late=False)  # no document crosses a border: nobody sends
        numbers = [part for to_rank in parts for part in to_rank] or [states.new_empty(0)]
        return channel.begin_all_to_all(_flat(numbers), [sum(part.numel() for part in to_rank) for to_rank in parts], receive, FORWARD)

    def finish(self, pending: Pending, states: Tensor, flow: Flow, channel: Channel) -> Tensor:
        me, size, received, result = channel.rank, states.shape[-1], pending.finish(), torch.zeros_like(states)
        cuts = _cuts(len(self.slow) * size, channel.size)
        width = cuts[me][1] - cuts[me][0]
        slots = {piece: slot for slot, piece in enumerate(flow.held[me])}
        given: dict[int, Tensor] = {}
        at = 0
        for rank in range(channel.size):
            near_pieces, far_pieces = self._from(rank, flow, me)
            for piece in near_pieces:
                result[slots[piece]] = received[at : at + states[0].numel()].view(states.shape[1:])
                at += states[0].numel()
            for piece in far_pieces:
                given[piece] = received[at : at + width * size].view(width, size)
                at += width * size
        if not self._scans(flow):
            return result
        entering = _scan(given, flow, _rows(self.decay_H[self.slow], size)[cuts[me][0] : cuts[me][1]], nearest=False)
        takers = [[piece for piece in held if piece in flow.far_targets] for held in flow.held]
        back = [[entering[piece] for piece in pieces] for pieces in takers]
        widths = [len(takers[me]) * (high - low) * size for low, high in cuts]
        sent = [len(pieces) * width * size for pieces in takers]
        flat = _flat([part for parts in back for part in parts]) if any(sent) else states.new_empty(0)
        parts = channel.begin_all_to_all(flat, sent, widths, BACK).finish().split(widths)
        if takers[me]:
            rows = torch.cat([part.view(len(takers[me]), -1, size) for part in parts], dim=1)
            for piece, state in zip(takers[me], rows.view(len(takers[me]), -1, size, size), strict=True):
                result[slots[piece], self.slow] += state
        return result

    def numbers_sent(self, flow: Flow, heads: int, size: int) -> int:
        rows = len(self.heads) * size
        cuts = _cuts(rows, len(flow.held))
        mine = [flow.owners[piece] for pieces in (flow.far_sources, flow.far_targets) for piece in pieces]
        kept = sum(high - low for low, high in (cuts[rank] for rank in mine))
        return (len(flow.near) * heads * size + len(mine) * rows - kept) * size

    def _scans(self, flow: Flow) -> bool:
        return bool(len(self.slow) and flow.far_sources)

    @staticmethod
    def _from(rank: int, flow: Flow, me: int) -> tuple[list[int], list[int]]:
        """What `rank` sends here: my pieces that take its states whole; its pieces whose slow rows are scanned."""
        near = [piece for piece in flow.held[me] if piece in flow.near and flow.owners[piece - 1] == rank]
        return near, [piece for piece in flow.held[rank] if piece in flow.far_sources]


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


def _scan(given: Mapping[int, Tensor], flow: Flow, decay_R1: Tensor, *, nearest: bool) -> dict[int, Tensor]:
    """For each target the sum over its sources of some rows of the states, `[R, D]`; not `nearest`: the piece before it is left out."""
    entering: dict[int, Tensor] = {}
    carry: Tensor | None = None
    for piece in range(1, len(flow.owners)):  # carry: what enters `piece`, but for the state of the piece just before it
        before = _sum(carry, given.get(piece - 2)) if flow.first[piece] < piece - 1 else None
        carry = None if before is None else before * decay_R1
        if flow.targets[piece]:
            total = _sum(carry, given.get(piece - 1) if nearest else None)
            if total is not None:
                entering[piece] = total
    return entering


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _rows(decay_H: Tensor, size: int) -> Tensor:
    """The decay of every row of a state, `[H * D, 1]`."""
    return decay_H.repeat_interleave(size)[:, None]


def _cuts(rows: int, ranks: int) -> list[tuple[int, int]]:
    """Rows low .. high - 1 for each rank: as even as can be."""
    return [(rows * rank // ranks, rows * (rank + 1) // ranks) for rank in range(ranks)]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


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
    decay, slow = torch.exp(-slopes_H.to(dtype) * length), slow_heads(host_slopes, length, cut=cut)
    kinds: dict[str, Exchange] = {
        "gather": Gather(decay_H=decay),
        "transpose": Transpose(decay_H=decay),
        "pruned": Pruned(decay_H=decay, heads=slow, slow=torch.tensor(slow, dtype=torch.int64, device=slopes_H.device)),
    }
    if kind != "auto" and kind not in kinds:
        raise ValueError(f"state exchange {kind!r} is unknown; choose auto, gather, transpose or pruned")
    if ranks == 1:
        return kinds["gather"]
    return Cheapest(kinds=tuple(kinds.values()), slow=len(slow)) if kind == "auto" else kinds[kind]
