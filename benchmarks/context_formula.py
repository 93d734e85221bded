"""Bytes that context ranks send, from where documents and pieces begin alone: no call into parallel/, so that the two can be compared.

A row of T tokens lies in 2 CP pieces; `owners[p]` is the rank of piece p, `bounds` the row's cu_seqlens. S is a layer's state, H * D * D
numbers. All counts are of what a rank sends to others, forward; the backward of states is the forward of the mirrored row.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FP32, BF16 = 4, 2


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What ranks 0, 1, ... send, `[CP]` bytes, and in how many steps one after the other."""

    bytes: np.ndarray
    steps: int


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """How many states each rank, `[CP]`, hands over where a document crosses from one rank's piece to another's."""

    near: np.ndarray
    """To the very next piece."""
    given: np.ndarray
    """That matter to a piece further on."""
    taken: np.ndarray
    """That enter its pieces from further back."""


def mirrored(bounds: Sequence[int], owners: Sequence[int]) -> tuple[list[int], list[int]]:
    """The row read from its end: gradients flow as states do in it."""
    return [bounds[-1] - bound for bound in reversed(bounds)], list(reversed(owners))


def crossings(bounds: Sequence[int], owners: Sequence[int]) -> Crossings:
    """Counted piece by piece."""
    pieces, ranks, length = len(owners), max(owners) + 1, bounds[-1] // len(owners)
    start = [bisect_right(bounds, piece * length) for piece in range(pieces)]
    end = [bisect_right(bounds, (piece + 1) * length - 1) for piece in range(pieces)]
    takers = [p for p in range(1, pieces) if end[p - 1] == start[p] and owners[p - 1] != owners[p]]
    last = {start[p]: p for p in takers}  # by document
    first = {start[p]: p - 1 for p in reversed(takers)}
    near, given, taken = (np.zeros(ranks, np.int64) for _ in range(3))
    for p in takers:
        near[owners[p - 1]] += 1
        given[owners[p - 1]] += last[start[p]] > p
        taken[owners[p]] += first[start[p]] < p - 1
    return Crossings(near=near, given=given, taken=taken)


def states_sent(kind: str, crossing: Crossings, heads: int, size: int, slow: int) -> Sent:
    """One lightning layer; `slow` of its heads remember more than a piece. fp32 states.

    gather      2 (CP-1) S                                            one step
    transpose   2 (S - S_r) + 2 (CP-1) S_r                            two; S_r: the share of rank r, S / CP as near as rows divide
    pruned      near S + given (F - F_r), then (taken by others) F_r  F: the state's slow heads; nothing where no document crosses
    auto        for this row the one of these that sends least, all ranks together; the first of those that send as little
    """
    if kind == "auto":
        each = [states_sent(one, crossing, heads, size, slow) for one in ("gather", "transpose", "pruned")]
        return min(each, key=lambda sent: sent.bytes.sum())
    ranks, row = len(crossing.near), size * FP32
    if kind == "gather":
        return Sent(bytes=np.full(ranks, 2 * (ranks - 1) * heads * size * row), steps=1)
    if kind == "transpose":
        share = _shares(heads * size, ranks)
        return Sent(bytes=(2 * (heads * size - share) + 2 * (ranks - 1) * share) * row, steps=2)
    share, scans = _shares(slow * size, ranks), bool(slow and crossing.given.any())
    sent = crossing.near * heads * size + crossing.given * (slow * size - share) + (crossing.taken.sum() - crossing.taken) * share
    return Sent(bytes=sent * row, steps=scans + bool(scans or crossing.near.any()))


def lasp2_sent(ranks: int, heads: int, size: int) -> int:
    """LASP-2's all-gather (arXiv 2502.07563): ranks hold the sequence in order, one state each, (CP-1) S in one step."""
    return (ranks - 1) * heads * size * size * FP32


def _shares(rows: int, ranks: int) -> np.ndarray:
    """Rows of each rank."""
    return np.diff(rows * np.arange(ranks + 1) // ranks)


@dataclass(frozen=True, kw_only=True)
class RingRows:
    """Rows of keys and values that ranks 0, 1, ... send and receive, `[CP]`, and the number of hops."""

    sent: np.ndarray
    received: np.ndarray
    hops: int


def ring_rows(bounds: Sequence[int], owners: Sequence[int]) -> RingRows:
    """Of each run of pieces, what belongs to its last document goes once to every other rank that holds more of that document later on."""
    ranks, length, table = max(owners) + 1, bounds[-1] // len(owners), np.array(owners)
    sent, received = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    distances: set[int] = set()
    first = 0
    for last, owner in enumerate(owners):
        if last + 1 < len(owners) and owners[last + 1] == owner:
            continue
        start, stop, first = first * length, (last + 1) * length, last + 1
        document = bisect_right(bounds, stop - 1)
        later = np.unique(table[last + 1 : -(-bounds[document] // length)])
        later = later[later != owner]
        rows = stop - max(start, bounds[document - 1])
        sent[owner] += rows * len(later)
        received[later] += rows
        distances.update(((later - owner) % ranks).tolist())
    return RingRows(sent=sent, received=received, hops=len(distances))


@dataclass(frozen=True, kw_only=True)
class KeyValueBytes:
    """One softmax layer, `[CP]` bytes a rank sends, forward and backward; between key-value ranks (`heads`) and along the ring."""

    heads: np.ndarray
    ring: np.ndarray
    heads_back: np.ndarray
    ring_back: np.ndarray
    hops: int


def keys_values_sent(
    bounds: Sequence[int], owners: Sequence[int], heads: int, groups: int, size: int, *, degree: int = 1, itemsize: int = BF16
) -> KeyValueBytes:
    """`degree` neighbours first trade tokens for heads (q, k, v, and o back); the ring then has CP / degree ranks, groups / degree heads.

    Backward: keys and values travel again, and a gradient for each that came goes back.
    """
    ranks = max(owners) + 1
    rows = ring_rows(bounds, [owner // degree for owner in owners])
    row, token = 2 * groups // degree * size * itemsize, (2 * heads + 2 * groups) * size * itemsize
    traded = np.full(ranks, bounds[-1] // ranks * token * (degree - 1) // degree)
    sent, received = (np.repeat(count, degree) * row for count in (rows.sent, rows.received))
    return KeyValueBytes(heads=traded, ring=sent, heads_back=traded, ring_back=sent + received, hops=rows.hops)
