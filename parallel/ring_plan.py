"""Who needs which keys of whom in ring attention: pure arithmetic on the host.

Documents are contiguous, so between a run of queries and an earlier run of keys at most one document is shared: the one of the first
query, and of the last key. What is needed of it is one dense rectangle, and of the run of keys always a suffix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pieces import Pieces, Run


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """Queries that see all of these keys."""

    queries: slice
    """Local rows."""
    keys: slice
    """Rows of what the hop brought; local rows where keys and queries are of one rank."""


@dataclass(frozen=True, kw_only=True)
class Hop:
    """Keys and values go from each rank to rank + distance (modulo ranks)."""

    distance: int
    send: tuple[slice, ...]
    """Local rows that rank + distance needs; it gets them one after the other."""
    receive: int
    """Rows that come from rank - distance."""
    rectangles: tuple[Rectangle, ...]

    @property
    def sent(self) -> int:
        """Rows that go to rank + distance."""
        return sum(rows.stop - rows.start for rows in self.send)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One rank's part of ring attention."""

    bounds: tuple[int, ...]
    """cu_seqlens of the local rows, without empty documents: causal attention over them comes first."""
    own: tuple[Rectangle, ...]
    """Between the rank's own runs."""
    hops: tuple[Hop, ...]
    """Those that some rank needs: of the same distances on every rank."""

    @property
    def alone(self) -> bool:
        """Whether the causal attention is all there is: nothing is merged, sent or received."""
        return not self.own and not self.hops


def plan_ring(pieces: Pieces, rank: int) -> Plan:
    """The plan of `rank`. A few milliseconds at 128 ranks with one document."""
    ranks = pieces.ranks
    runs = [pieces.runs(r) for r in range(ranks)]
    hops = []
    for distance in _distances(pieces, runs):
        source, target = (rank - distance) % ranks, (rank + distance) % ranks
        rows = _needed(pieces, runs[rank], runs[source])
        hops.append(
            Hop(
                distance=distance,
                send=tuple(_needed(pieces, runs[target], runs[rank])),
                receive=sum(part.stop - part.start for part in rows),
                rectangles=tuple(_within(rows, _rectangles(pieces, runs[rank], runs[source]))),
            )
        )
    bounds = tuple(dict.fromkeys(pieces.local(rank).bounds))
    return Plan(bounds=bounds, own=tuple(_rectangles(pieces, runs[rank], runs[rank])), hops=tuple(hops))


def rows_sent(pieces: Pieces) -> dict[int, list[int]]:
    """For each hop that is needed the rows of keys and values that ranks 0, 1, ... send; a row is 2 * G * D numbers, once each way."""
    plans = [plan_ring(pieces, rank) for rank in range(pieces.ranks)]
    return {hops[0].distance: [hop.sent for hop in hops] for hops in zip(*(plan.hops for plan in plans), strict=True)}


def _distances(pieces: Pieces, runs: Sequence[Sequence[Run]]) -> list[int]:
    """From a run's owner to those who hold what follows of its last document."""
    found: set[int] = set()
    for owner, held in enumerate(runs):
        for run in held:
            beyond = -(-pieces.end(run.stop - 1) // pieces.length)  # the first piece that begins after the document
            found.update((to - owner) % len(runs) for to in pieces.owners[run.last + 1 : beyond])
    return sorted(found - {0})


def _rectangles(pieces: Pieces, queries: Sequence[Run], keys: Sequence[Run]) -> list[Rectangle]:
    """Between runs of two ranks, in local rows of each."""
    found = []
    for late in queries:
        begin = pieces.begin(late.start)
        rows = slice(late.offset, late.offset + min(late.stop, pieces.end(late.start)) - late.start)
        for early in keys:
            if begin < early.stop <= late.start:
                shift = early.offset - early.start
                found.append(Rectangle(queries=rows, keys=slice(max(early.start, begin) + shift, early.stop + shift)))
    return found


def _needed(pieces: Pieces, queries: Sequence[Run], keys: Sequence[Run]) -> list[slice]:
    """The owner's local rows that some query needs, in their order; of a run all queries that need any need the same."""
    starts = {rectangle.keys.start: rectangle.keys for rectangle in _rectangles(pieces, queries, keys)}
    return [starts[start] for start in sorted(starts)]


def _within(rows: Sequence[slice], rectangles: Sequence[Rectangle]) -> list[Rectangle]:
    """The rectangles with their keys counted in what arrives: `rows` one after the other."""
    place, arrived = {}, 0
    for part in rows:
        place[part.start] = arrived
        arrived += part.stop - part.start
    return [
        Rectangle(queries=r.queries, keys=slice(place[r.keys.start], place[r.keys.start] + r.keys.stop - r.keys.start)) for r in rectangles
    ]
