"""Which rank the others wait for: judged from what every rank last said of itself. Pure arithmetic, no clock and no other rank.

A rank is *stopped* when it says nothing new: SIGSTOP, a machine that is gone, a C call that never gives the interpreter back. It is *hung*
when it goes on saying that it stands still, waits for nobody, and in some process group has entered fewer collectives than a peer that
waits. Counters are compared within one group alone: its members enter its collectives in one order, members of different groups do not.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

BUSY = 20
"""A rank that stands still but computes (its thread's CPU time grows) has so many times the limit: a long kernel is no hang."""
STARTING = 300.0
"""Seconds in which every rank must have said its first word."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    number: int
    """Of this beat."""
    phase: str
    limit: float
    """Seconds that this phase may stand still."""
    node: str = ""
    """Slurm's name for the host, under Slurm."""
    counts: dict[str, int] = field(default_factory=dict)
    """Collectives entered since the start, by process group."""
    moves: int = 0
    """Phases and steps begun."""
    waiting: bool = False
    """The main thread is inside a wait for other ranks."""
    at: str = ""
    """Where the main thread is."""
    effort: int = 0
    """CPU time, page faults and waits for a disk of the main thread: what grows is at work."""
    work: dict[str, float] = field(default_factory=dict)
    """Seconds that the main thread was at work, not waiting for other ranks, by phase."""
    stacks: str = ""
    """A file on its host that gets the stacks of its threads when the process gets SIGUSR2."""
    over: bool = False
    """The last beat of a rank that ended well."""


Kind = Literal["absent", "stopped", "hung", "deadlocked"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Who holds the others up."""

    kind: Kind
    ranks: list[int]
    lines: list[str]
    """One for each of `ranks`: who, where, for how long, and what tells it."""
    beats: list[Beat] = field(default_factory=list)
    """The last of each of `ranks`, where there was one."""
    when: str = ""
    """The same on all ranks: a name for what is kept of it."""

    def __str__(self) -> str:
        return "; ".join(self.lines)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Self:
        """Back from as_dict."""
        return cls(**{**tree, "beats": [Beat(**beat) for beat in tree["beats"]]})


@dataclass(kw_only=True)
class _Seen:
    """One rank: its last beat, and since when what has not changed."""

    beat: Beat
    spoke: float
    moved: float
    worked: float


class Jury:
    """Keeps what was seen of the ranks; `judge` it now and then. Times are seconds of any one clock that never goes back."""

    def __init__(self, ranks: list[int], *, limit: float, now: float) -> None:
        self.ranks, self.limit = ranks, limit
        self._seen: dict[int, _Seen] = {}
        self._begun = self._last = now

    def see(self, beats: Mapping[int, Beat], now: float) -> None:
        """Takes in the ranks' newest beats. Where this process itself slept (Ctrl-Z, a laptop's lid), nobody is charged for that time."""
        if (slept := now - self._last) > self.limit / 2:
            self._begun += slept
            for seen in self._seen.values():
                seen.spoke, seen.moved, seen.worked = seen.spoke + slept, seen.moved + slept, seen.worked + slept
        self._last = now
        for rank, beat in beats.items():
            if rank not in self._seen:
                self._seen[rank] = _Seen(beat=beat, spoke=now, moved=now, worked=now)
                continue
            seen = self._seen[rank]
            before = seen.beat
            if beat.number != before.number:
                seen.spoke = now
            if (beat.moves, beat.counts) != (before.moves, before.counts):
                seen.moved = now
            if beat.effort != before.effort:
                seen.worked = now
            seen.beat = beat

    def judge(self, now: float) -> Verdict | None:
        """None where nobody is late."""
        absent = [rank for rank in self.ranks if rank not in self._seen]
        if absent and now - self._begun > STARTING:
            return Verdict(kind="absent", ranks=absent, lines=[f"rank {rank} has not come within {STARTING:.0f} s" for rank in absent])
        present = {rank: seen for rank, seen in self._seen.items() if not seen.beat.over}
        silent = [rank for rank, seen in present.items() if now - seen.spoke > self.limit]
        if silent:
            return self._verdict("stopped", silent, [self._stopped(present[rank], now) for rank in silent])
        still = {rank: seen for rank, seen in present.items() if now - seen.moved > seen.beat.limit}
        held_up = {rank for rank, seen in still.items() if seen.beat.waiting}
        speaking = {rank for rank, seen in still.items() if now - seen.spoke < self.limit / 2}  # of the others it will soon be known
        idle = {rank for rank, seen in still.items() if rank in speaking - held_up and self._idle(seen, now)}
        behind = {rank: lag for rank in idle if (lag := self._lag(rank, held_up))}
        if behind:
            return self._verdict("hung", list(behind), [self._hung(still[rank], now, lag) for rank, lag in behind.items()])
        if len(still) < len(present):
            return None
        if idle and held_up:  # the last exchange was between two ranks: no counter tells, but some wait and these do not
            ranks = sorted(idle)
            return self._verdict("hung", ranks, [self._hung(still[rank], now, "the others wait") for rank in ranks])
        if len(held_up) == len(present) > 1 and all(now - seen.moved > BUSY * seen.beat.limit for seen in still.values()):
            ranks = sorted(held_up)
            return self._verdict("deadlocked", ranks, [self._hung(still[rank], now, "all ranks wait") for rank in ranks])
        return None

    def _verdict(self, kind: Kind, ranks: list[int], lines: list[str]) -> Verdict:
        return Verdict(kind=kind, ranks=ranks, lines=lines, beats=[self._seen[rank].beat for rank in ranks])

    def _idle(self, seen: _Seen, now: float) -> bool:
        return now - seen.worked > seen.beat.limit or now - seen.moved > BUSY * seen.beat.limit

    def _lag(self, rank: int, held_up: set[int]) -> str:
        """In which group this rank is behind a peer that waits; empty where in none."""
        for group, count in self._seen[rank].beat.counts.items():
            others = [self._seen[other].beat.counts[group] for other in held_up if group in self._seen[other].beat.counts]
            if others and max(others) > count:
                return f"in group {group} it has entered {count} collectives, a peer that waits {max(others)}"
        return ""

    def _hung(self, seen: _Seen, now: float, why: str) -> str:
        return f"{_who(seen.beat)} stands still for {now - seen.moved:.1f} s in {seen.beat.phase}, at {seen.beat.at}: {why}"

    def _stopped(self, seen: _Seen, now: float) -> str:
        return f"{_who(seen.beat)} has said nothing for {now - seen.spoke:.1f} s, last in {seen.beat.phase}, at {seen.beat.at}"


def _who(beat: Beat) -> str:
    return f"rank {beat.rank} (process {beat.pid} on {beat.host})"
