"""Whose experts a rank's rows go to, and back: arithmetic on counts that all ranks of a block know.

A block is expert * expert_tensor ranks that hold every expert once: its expert ranks have different experts, its expert-tensor ranks
different slices of the same ones. Blocks are what expert-data parallelism repeats.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

MOST_GROUPS = 4
ENOUGH_ROWS = 512
"""Rows of one expert's matrix product below which it loses speed: a GPU reaches about m / (m + 128) of its peak at m rows."""


def choose_groups(rows: int, experts: int, ranks: int) -> int:
    """Token groups for `rows` (token, choice) rows of a block of `ranks` ranks: 4, 2 or 1, the most that leave an expert ENOUGH_ROWS.

    While one group is computed others travel, which hides at most 1 - 1 / groups of the exchange (arXiv 2501.08313 section 3).
    """
    if ranks == 1:
        return 1
    return next((groups for groups in (4, 2) if rows >= groups * experts * ENOUGH_ROWS), 1)


@dataclass(frozen=True, kw_only=True)
class Trip:
    """One token group's way to the experts and back, as one rank sees it. All numbers are rows."""

    rank: tuple[int, int]
    """(expert rank, expert-tensor rank) of this rank."""
    send: tuple[int, ...]
    """To each expert rank; this rank's rows are sorted by expert, and so by expert rank."""
    receive: tuple[int, ...]
    """From each expert rank."""
    gathered: tuple[int, ...]
    """What each expert-tensor rank receives: all of them compute all of it, each with its slice of the experts."""
    arriving: tuple[tuple[int, ...], ...]
    """Of each local expert, from [expert-tensor rank, expert rank], flattened: as they lie after the gather, expert-tensor rank first."""
    multiple: int
    """Rows of an expert are filled up with zeros to a multiple of this; an expert without rows then gets `multiple` of zeros."""

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each local expert, filling included."""
        return tuple(sum(rows) + filling for rows, filling in zip(self.arriving, self.fillings, strict=True))

    @cached_property
    def fillings(self) -> tuple[int, ...]:
        """Rows of zeros after each local expert's."""
        if self.multiple == 1:
            return (0,) * len(self.arriving)
        return tuple(-sum(rows) % self.multiple if sum(rows) else self.multiple for rows in self.arriving)

    @property
    def widest(self) -> int:
        """What an expert-tensor rank sends to each other one in the gather, filled up to the most that any of them has."""
        return max(self.gathered)

    @property
    def in_order(self) -> bool:
        """Rows arrive sorted by expert and filled."""
        sources = len(self.arriving[0])
        return not any(self.fillings) and (sources == 1 or len(self.arriving) == 1)


def plan_trips(counts: Tensor, rank: tuple[int, int], ranks: tuple[int, int], multiple: int) -> list[Trip]:
    """A trip for each token group, from int64 `[expert ranks * expert-tensor ranks, groups, experts]` on the host; a block's ranks are
    numbered expert-tensor rank first."""
    (e, t), (expert, expert_tensor) = rank, ranks
    table = counts.view(expert, expert_tensor, counts.shape[1], expert, -1)  # from expert rank, slice; group; to expert rank, its expert
    trips = []
    for group in range(counts.shape[1]):
        arriving = table[:, :, group, e].transpose(0, 1)  # [slice, expert rank, expert]
        trips.append(
            Trip(
                rank=rank,
                send=tuple(table[e, t, group].sum(-1).tolist()),
                receive=tuple(arriving[t].sum(-1).tolist()),
                gathered=tuple(arriving.sum((1, 2)).tolist()),
                arriving=tuple(tuple(rows) for rows in arriving.flatten(0, 1).T.tolist()),
                multiple=multiple,
            )
        )
    return trips


def rows_sent(trip: Trip) -> dict[str, int]:
    """Rows this rank sends to others on one trip, forward or backward; times hidden size and bytes of a number, its bytes."""
    e, t = trip.rank
    return {
        "dispatch": sum(trip.send) - trip.send[e],
        "gather": (len(trip.gathered) - 1) * trip.widest,
        "scatter": sum(trip.gathered) - trip.gathered[t],
        "combine": sum(trip.receive) - trip.receive[e],
    }
