"""A packed row of documents, cut into pieces that context ranks hold: pure arithmetic on the host, one layout for every layer.

A row of T tokens is cut into 2 * CP pieces of T / (2 CP) tokens, wherever documents begin or end. A rank holds two of them; where its
pieces are neighbours they are one run. Zigzag: rank r holds pieces r and 2 CP - 1 - r, so that each rank has an early piece with little
to look back on and a late one with much (Llama 3, arXiv 2407.21783 section 3.3.2). `cu_seqlens` alone says where documents are.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from parallel.once import Remembers


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring pieces `first` .. `last` of one rank: tokens `start` .. `stop` - 1 of the row, local tokens from `offset` on."""

    first: int
    last: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Pieces(Remembers):
    """One row's documents and who holds what. `bounds` is cu_seqlens; `owners[p]` is the rank that holds piece p."""

    bounds: tuple[int, ...]
    owners: tuple[int, ...]

    def __post_init__(self) -> None:
        bounds, pieces = self.bounds, len(self.owners)
        if not bounds or bounds[0] != 0 or any(b < a for a, b in pairwise(bounds)):
            shown = list(bounds) if len(bounds) <= 8 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}] ({len(bounds)} numbers)"
            raise ValueError(f"cu_seqlens is {shown}; it must begin with 0 and never fall")
        if bounds[-1] == 0 or bounds[-1] % pieces:
            raise ValueError(
                f"the row has {bounds[-1]} tokens, not a multiple of its {pieces} pieces (2 * layout.context): change its length or layout"
            )
        held = [self.owners.count(rank) for rank in range(self.ranks)]
        if min(held) != max(held):
            raise ValueError(f"the ranks hold {held} pieces; every rank must hold as many as the others")

    @property
    def tokens(self) -> int:
        """Of the whole row."""
        return self.bounds[-1]

    @property
    def length(self) -> int:
        """Tokens of a piece."""
        return self.tokens // len(self.owners)

    @property
    def ranks(self) -> int:
        return max(self.owners) + 1

    @property
    def slots(self) -> int:
        """Pieces of a rank, for each of which states may come and go: slot i is its i-th piece. None where one rank holds the row."""
        return len(self.owners) // self.ranks if self.ranks > 1 else 0

    def held(self, rank: int) -> tuple[int, ...]:
        """The rank's pieces, in the order of the row."""
        return tuple(piece for piece, owner in enumerate(self.owners) if owner == rank)

    def runs(self, rank: int) -> list[Run]:
        """The rank's pieces, neighbours joined, in the order of the row."""
        spans: list[tuple[int, int]] = []
        for piece in self.held(rank):
            if spans and spans[-1][1] == piece - 1:
                spans[-1] = (spans[-1][0], piece)
            else:
                spans.append((piece, piece))
        runs, offset = [], 0
        for first, last in spans:
            runs.append(Run(first=first, last=last, start=first * self.length, stop=(last + 1) * self.length, offset=offset))
            offset += runs[-1].stop - runs[-1].start
        return runs

    def begin(self, token: int) -> int:
        """Where the document of `token` begins."""
        return self.bounds[bisect_right(self.bounds, token) - 1]

    def end(self, token: int) -> int:
        """Where the document of `token` ends (its last token + 1)."""
        return self.bounds[bisect_right(self.bounds, token)]

    @cached_property
    def first(self) -> tuple[int, ...]:
        """For each piece p the piece in which the document of its first token begins; p itself where a document begins with p."""
        return tuple(self.begin(piece * self.length) // self.length for piece in range(len(self.owners)))

    def joined(self, degree: int) -> "Pieces":
        """The same row shared out over groups of `degree` neighbouring ranks."""
        if degree == 1:
            return self
        return self.once(("joined", degree), lambda: Pieces(self.bounds, tuple(owner // degree for owner in self.owners)))

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """The rank's tokens, piece after piece: `[T, ...]` -> `[T / CP, ...]`."""
        if len(whole) != self.tokens:
            raise ValueError(f"a tensor of {len(whole)} tokens was given to be cut; the row has {self.tokens}")
        runs = self.runs(rank)
        return whole[runs[0].start : runs[0].stop] if len(runs) == 1 else torch.cat([whole[run.start : run.stop] for run in runs])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`: what ranks 0, 1, ... hold -> the whole row."""
        whole = parts[0].new_empty((self.tokens, *parts[0].shape[1:]))
        for rank, part in enumerate(parts):
            for run in self.runs(rank):
                whole[run.start : run.stop] = part[run.offset : run.offset + run.stop - run.start]
        return whole

    def local(self, rank: int) -> "Local":
        """The documents as the rank sees them."""
        bounds, enters, leaves = [0], [-1] * self.slots, [-1] * self.slots
        slot = {piece: i for i, piece in enumerate(self.held(rank))}
        for run in self.runs(rank):
            if self.begin(run.start) < run.start:
                enters[slot[run.first]] = len(bounds) - 1
            inside = self.bounds[bisect_right(self.bounds, run.start) : bisect_left(self.bounds, run.stop)]
            bounds += [bound - run.start + run.offset for bound in (*inside, run.stop)]
            if self.end(run.stop - 1) > run.stop:
                leaves[slot[run.last]] = len(bounds) - 2
        return Local(bounds=tuple(bounds), enters=tuple(enters), leaves=tuple(leaves))

    @property
    def squares(self) -> int:
        """Sum of the documents' squared lengths: what causal attention costs."""
        return sum((end - begin) ** 2 for begin, end in pairwise(self.bounds))

    def work(self) -> list[int]:
        """(query, key) pairs of causal attention inside documents, for each piece's queries."""
        return [self._pairs(piece * self.length, (piece + 1) * self.length) for piece in range(len(self.owners))]

    def _pairs(self, start: int, stop: int) -> int:
        pairs = 0
        while start < stop:
            begin, end = self.begin(start), min(self.end(start), stop)
            low, high = start - begin, end - begin
            pairs += (high * (high + 1) - low * (low + 1)) // 2
            start = end
        return pairs

    def imbalance(self) -> float:
        """The busiest rank's softmax attention over the mean rank's; 1 at balance."""
        work = self.work()
        totals = [sum(work[piece] for piece in self.held(rank)) for rank in range(self.ranks)]
        return max(totals) * self.ranks / sum(totals)


@dataclass(frozen=True, kw_only=True)
class Local:
    """The documents of one rank's tokens."""

    bounds: tuple[int, ...]
    """cu_seqlens of the local tokens; a document that is cut between runs is a document in each."""
    enters: tuple[int, ...]
    """For each slot the local document that goes on from another rank at the start of the slot's piece, or -1."""
    leaves: tuple[int, ...]
    """For each slot the local document that another rank goes on with after the slot's piece, or -1."""


def zigzag(ranks: int) -> tuple[int, ...]:
    """Rank r holds pieces r and 2 ranks - 1 - r; a single rank holds the row in one piece."""
    return (*range(ranks), *reversed(range(ranks))) if ranks > 1 else (0,)


def balanced(bounds: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Two pieces a rank, the costliest with the cheapest and so on inwards: of all pairings the one with the smallest busiest rank.

    For one document it is the zigzag; for many, whose pieces cost alike, no rank is left with two dear ones.
    """
    if ranks == 1:
        return zigzag(1)
    work = Pieces(tuple(bounds), zigzag(ranks)).work()
    order = sorted(range(2 * ranks), key=lambda piece: (work[piece], piece))
    owners = [0] * (2 * ranks)
    for rank in range(ranks):
        owners[order[rank]] = owners[order[-1 - rank]] = rank
    return tuple(owners)


def cut_row(bounds: Sequence[int], ranks: int, owners: str = "zigzag") -> Pieces:
    """The row's documents shared out over `ranks` by the rule `owners`: "zigzag" or "balanced"."""
    table = balanced(bounds, ranks) if owners == "balanced" else zigzag(ranks)
    return Pieces(tuple(bounds), table)
