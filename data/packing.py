"""Rows out of a stream of documents: a window of it at a time, either cut every `length` tokens or packed by best fit."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.shuffle import shuffled
from data.stream import Pieces, Stream

Packing = Literal["concat", "best_fit"]
ROW_ORDER = 2**32
"""Added to the seed (and kept below 2^63) for the order of a window's rows, so that it has nothing to do with the order of documents."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """The packing plan of tokens `begin` up to `end` of a stream: every one of them in exactly one row.

    Row i holds pieces order[i]: bounds[order[i]] up to bounds[order[i] + 1]. tokens and split count, per row (int64 [R], in the order of
    rows), what it holds of documents, and the documents begun in it of which it holds only a part.
    """

    begin: int
    end: int
    pieces: Pieces
    bounds: NDArray[np.int64]
    order: NDArray[np.int64]
    tokens: NDArray[np.int64]
    split: NDArray[np.int64]

    @property
    def rows(self) -> int:
        return len(self.order)

    def row(self, number: int) -> Pieces:
        """The pieces of row `number`."""
        at = int(self.order[number])
        return self.pieces.take(slice(int(self.bounds[at]), int(self.bounds[at + 1])))


def plan_window(stream: Stream, begin: int, *, length: int, packing: Packing, window_tokens: int) -> Window:
    """Packs what stands from `begin` on, about max(length, min(window_tokens, an epoch)) tokens, into rows of `length` in a random order.

    concat:   exact cuts of the stream, as many as fit the window; the window may begin and end inside a document.
    best_fit: whole documents, up to the end of the one in which the window is full. One longer than a row gives full rows and a rest; rests
              and shorter documents go, the longest first, where they leave the least room (Ding et al. 2024, arXiv 2404.10830).

    Neighbouring rows are often the same long document, and a model that sees one for many steps on end forgets the rest: so rows are
    shuffled. In time and memory linear in the window's documents and rows, but for sorting.
    """
    wanted = max(length, min(window_tokens, stream.size))
    if packing == "concat":
        end = begin + wanted // length * length
        pieces, rows = _cut(stream.pieces(begin, end), length)
    else:
        end = stream.end_of_document(begin + wanted - 1)
        pieces, rows = _fit(stream.pieces(begin, end), length)
    count = int(rows[-1]) + 1
    bounds = np.searchsorted(rows, np.arange(count + 1)).astype(np.int64)
    order = shuffled(count, seed=(stream.seed + ROW_ORDER) % 2**63, epoch=begin)
    cut = (pieces.starts == 0) & (pieces.stops < _whole(stream, pieces))
    tokens, split = (np.add.reduceat(x.astype(np.int64), bounds[:-1])[order] for x in (pieces.sizes, cut))
    return Window(begin=begin, end=end, pieces=pieces, bounds=bounds, order=order, tokens=tokens, split=split)


def best_fit_decreasing(sizes: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """The bin of each size, int64 [n]: the longest first, each into the fullest bin it fits into, else into a new one.

    1 <= size <= room. Bins of the same gap are one entry of a sorted list. Gaps that differ sum to no more than all bins' room, which is
    below twice the window: so there are at most 2 sqrt(window) of them, and finding one costs next to nothing. Equal sizes go together.
    """
    order = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    placed: list[int] = []
    times: list[int] = []
    gaps: list[int] = []  # that some bin has, ascending
    bins: dict[int, list[int]] = {}  # gap -> the bins that have it
    opened = 0
    for size, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            at = bisect_left(gaps, size)
            if at == len(gaps):
                gap, bin_number, opened = room, opened, opened + 1
            else:
                gap = gaps[at]
                bin_number = bins[gap].pop()
                if not bins[gap]:
                    del bins[gap], gaps[at]
            taken = min(left, gap // size)
            placed.append(bin_number)
            times.append(taken)
            left, gap = left - taken, gap - taken * size
            if gap:
                if gap not in bins:
                    insort(gaps, gap)
                bins.setdefault(gap, []).append(bin_number)
    result = np.empty(len(sizes), np.int64)
    result[order] = np.repeat(np.array(placed, np.int64), np.array(times, np.int64))
    return result


def _cut(pieces: Pieces, length: int) -> tuple[Pieces, NDArray[np.int64]]:
    """Pieces cut at every multiple of `length`, and the row of each, ascending."""
    ends = np.cumsum(pieces.sizes)
    edges = np.union1d(ends, np.arange(length, ends[-1] + 1, length))
    firsts = np.concatenate([np.zeros(1, np.int64), edges[:-1]])
    of = np.searchsorted(ends, firsts, side="right")
    starts = pieces.starts[of] + firsts - (ends - pieces.sizes)[of]
    return Pieces(documents=pieces.documents[of], starts=starts, stops=starts + edges - firsts), firsts // length


def _fit(pieces: Pieces, length: int) -> tuple[Pieces, NDArray[np.int64]]:
    """Full rows of what is longer than a row, everything else packed by best fit; and the row of each piece, ascending."""
    full, rest = pieces.sizes // length, pieces.sizes % length
    of_full, of_rest = np.repeat(np.arange(len(pieces)), full), np.flatnonzero(rest)
    number = np.arange(len(of_full)) - np.repeat(np.cumsum(full) - full, full)  # of the full row in its document
    starts = np.concatenate([pieces.starts[of_full] + number * length, pieces.stops[of_rest] - rest[of_rest]])
    sizes = np.concatenate([np.full(len(of_full), length, np.int64), rest[of_rest]])
    rows = np.concatenate([np.arange(len(of_full)), len(of_full) + best_fit_decreasing(rest[of_rest], length)])
    by_row = np.argsort(rows, kind="stable")
    documents = pieces.documents[np.concatenate([of_full, of_rest])]
    made = Pieces(documents=documents, starts=starts, stops=starts + sizes)
    return made.take(by_row), rows[by_row]


def _whole(stream: Stream, pieces: Pieces) -> NDArray[np.int64]:
    """Lengths of the documents the pieces are from."""
    return stream.view.dataset.lengths[pieces.documents]
