"""Which lightning states go from which piece to which: pure arithmetic, all ranks' view.

With E_i the state after piece i (of L tokens) from a zero state, the state that enters piece j is (LASP-2, arXiv 2502.07563, with decay
and documents)

    S_j = sum_{i = first_j}^{j-1} lam^(L (j-1-i)) E_i        first_j: the piece in which the document at the start of piece j begins

Gradients flow the same way from the last piece to the first: the mirrored Flow.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from parallel.once import Remembers
from parallel.pieces import Pieces


@dataclass(frozen=True, kw_only=True)
class Flow(Remembers):
    """States on their way along the pieces; piece p is the p-th in the order of the flow."""

    owners: tuple[int, ...]
    first: tuple[int, ...]
    """The earliest piece whose state matters to the state that enters p; p itself if none does. Never falls."""
    sources: tuple[bool, ...]
    """Whether p has a state to give: it is the last of its run, and its last document goes on."""
    targets: tuple[bool, ...]
    """Whether p takes a state: it is the first of its run, and its first document began before it."""

    @cached_property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """Each rank's pieces, in the order of the flow; slot i is the i-th."""
        pieces: list[list[int]] = [[] for _ in range(max(self.owners) + 1)]
        for piece, owner in enumerate(self.owners):
            pieces[owner].append(piece)
        return tuple(tuple(held) for held in pieces)

    @cached_property
    def last(self) -> tuple[int, ...]:
        """The latest piece that p's state matters to; p itself if none."""
        return tuple(bisect_right(self.first, piece) - 1 for piece in range(len(self.owners)))

    @cached_property
    def near(self) -> frozenset[int]:
        """Pieces that take the state of the piece just before them."""
        return frozenset(p for p in range(1, len(self.owners)) if self.targets[p] and self.sources[p - 1])

    @cached_property
    def far_sources(self) -> frozenset[int]:
        """Pieces whose state matters to one that is not just behind them."""
        return frozenset(i for i, gives in enumerate(self.sources) if gives and any(self.targets[i + 2 : self.last[i] + 1]))

    @cached_property
    def far_targets(self) -> frozenset[int]:
        """Pieces that take the state of one that is not just before them."""
        return frozenset(j for j, takes in enumerate(self.targets) if takes and any(self.sources[self.first[j] : max(j - 1, 0)]))

    def mirrored(self) -> "Flow":
        """The flow of gradients: from the last piece to the first; what took now gives."""
        end = len(self.owners) - 1
        return Flow(
            owners=self.owners[::-1],
            first=tuple(end - last for last in reversed(self.last)),
            sources=self.targets[::-1],
            targets=self.sources[::-1],
        )


def state_flow(pieces: Pieces) -> Flow:
    """What the row's documents ask for."""
    sources, targets = [False] * len(pieces.owners), [False] * len(pieces.owners)
    for rank in range(pieces.ranks if pieces.slots else 0):
        local = pieces.local(rank)
        for piece, enters, leaves in zip(pieces.held(rank), local.enters, local.leaves, strict=True):
            sources[piece], targets[piece] = leaves >= 0, enters >= 0
    return Flow(owners=pieces.owners, first=pieces.first, sources=tuple(sources), targets=tuple(targets))
