"""Which rank the others wait for most: the one that works longest between two looks, by phase.

Ranks that exchange in every layer take equally long for a step, and their step times do not tell who holds up whom. Their time at work
does: what of it is not spent waiting (pulse.py samples that). It is the host's: what a GPU does while its host goes on is not in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from parallel.verdict import Beat

SLOW = 0.7
"""Of the median rank's time at work over a rank's: below it the rank is named. Ours."""
LEAST = 1.0
"""Seconds at work, of the slowest rank, that a phase must have: less is noise of the samples."""


@dataclass(frozen=True, kw_only=True)
class Slowest:
    """The slowest rank of one phase."""

    phase: str
    rank: int
    host: str
    seconds: float
    """At work since the look before."""
    median: float
    """The median rank's."""

    @property
    def score(self) -> float:
        """1: as fast as the median rank."""
        return self.median / self.seconds

    def __str__(self) -> str:
        return f"{self.phase}: rank {self.rank} on {self.host} was at work {self.seconds:.1f} s, the median rank {self.median:.1f} s"


def slowest(before: Mapping[int, Beat], now: Mapping[int, Beat]) -> list[Slowest]:
    """The slowest rank of every phase that ranks in both were at work in for long enough, the slowest phase first."""
    found = []
    for phase in {phase for beat in now.values() for phase in beat.work}:
        worked = {rank: beat.work.get(phase, 0.0) - before[rank].work.get(phase, 0.0) for rank, beat in now.items() if rank in before}
        if len(worked) > 1 and max(worked.values()) >= LEAST:
            rank = max(worked, key=worked.__getitem__)
            middle = median(worked.values())
            found.append(Slowest(phase=phase, rank=rank, host=now[rank].host, seconds=worked[rank], median=middle))
    return sorted(found, key=lambda one: one.score)
