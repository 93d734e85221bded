"""The rows of one stage: each source's turn, the next row of its window, assembled ahead of time; and where that stands, in integers."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from data.batches import Row, assemble
from data.mixture import Shares, Turns
from data.packing import Packing, Window, plan_window
from data.stream import Pieces, Stream, seed_of
from data.views import View

ROWS_AHEAD = 2
"""Rows that each worker is ahead of training; a row of 1M tokens takes 24 MiB."""


@dataclass(frozen=True, kw_only=True)
class Bookmark:
    """Where one source stands. All integers; of the run, unless said."""

    begin: int = 0
    """Where the window being read begins in the source's stream, in tokens."""
    end: int = 0
    """Where it ends; as `begin` where none is."""
    rows: int = 0
    """Rows of the window already given."""
    turns: int = 0
    """Rows given in this stage."""
    tokens: int = 0
    """Tokens of documents given: what fills rows up is not counted."""
    split: int = 0
    """Documents begun of which a row held only a part."""

    def next_stage(self) -> "Bookmark":
        """Behind the window: the next stage repeats no document before the source is through."""
        return replace(self, begin=self.end, rows=0, turns=0)


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How a stage's rows are made: tokens in a row, how documents get into them, tokens in a packing window."""

    length: int
    packing: Packing
    window_tokens: int

    def __post_init__(self) -> None:
        if self.length < 1 or self.window_tokens < 1:
            raise ValueError(f"length {self.length}, window_tokens {self.window_tokens}: each must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row, and the name of the source that gave it."""

    row: Row
    source: str


class Sampler:
    """Rank `rank` of `ranks` of a stage's samples: iterating gives samples rank, rank + ranks, ... without end, each a Sample.

    Every rank goes through the same schedule, a function of the seed, the sources and the sample number alone, and assembles its own rows.
    `workers` threads do so ahead of time and one more plans each source's next window while this one is read (numpy's copies leave the
    interpreter to others; between processes rows would have to be copied again); with 0 everything is done when it is asked for. No row
    depends on `workers`, nor on `ranks`. What goes wrong is raised where the row it concerns is asked for.
    """

    def __init__(
        self,
        views: Mapping[str, View],
        shares: Shares,
        batching: Batching,
        *,
        seed: int,
        bookmarks: Mapping[str, Bookmark],
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
    ) -> None:
        """`shares` are of `views` in their order; `bookmarks` those of the sample to begin with, a multiple of `ranks`.

        ValueError where a source's window is not the one that was being read: its data or the packing changed.
        """
        if seed < 0 or workers < 0 or not 0 <= rank < ranks:
            raise ValueError(f"seed {seed}, workers {workers}, rank {rank} of {ranks}: none may be below 0, and rank is below ranks")
        self._names, self._rank, self._ranks = list(views), rank, ranks
        self._turns = Turns(shares, [bookmarks[name].turns for name in views])
        self._planner, self._pool = (ThreadPoolExecutor(n, "data") if workers else None for n in (1, max(workers, 1)))
        self._ahead: deque[tuple[Callable[[], Sample], tuple[Bookmark, ...]]] = deque()
        self._most = max(1, ROWS_AHEAD * workers)
        self._bookmarks = tuple(bookmarks[name] for name in views)
        try:
            self._cursors = [
                _Cursor(name, Stream(view, seed_of(seed, name)), batching, bookmarks[name], self._plan) for name, view in views.items()
            ]
            for source, cursor in enumerate(self._cursors):
                if shares.gives(source) or bookmarks[cursor.name].rows:
                    cursor.open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads; rows not yet begun are not made."""
        for pool in (self._pool, self._planner):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        self._fill(self._most)
        result, bookmarks = self._ahead.popleft()
        sample = result()
        self._bookmarks = bookmarks
        if self._pool is not None:
            self._fill(self._most)
        return sample

    @property
    def bookmarks(self) -> dict[str, Bookmark]:
        """Where each source stands when every rank has taken as many samples as this one."""
        return dict(zip(self._names, self._bookmarks, strict=True))

    def _fill(self, most: int) -> None:
        while len(self._ahead) < most:
            mine: tuple[_Cursor, Pieces] | None = None
            for rank in range(self._ranks):
                cursor = self._cursors[next(self._turns)]
                window, number = cursor.take()
                if rank == self._rank:
                    mine = cursor, window.row(number)
            assert mine is not None
            self._ahead.append((self._assembled(*mine), tuple(cursor.bookmark for cursor in self._cursors)))

    def _assembled(self, cursor: "_Cursor", pieces: Pieces) -> Callable[[], Sample]:
        """The sample, being made by a worker; or when it is called."""
        dataset, length = cursor.stream.view.dataset, cursor.batching.length

        def make() -> Sample:
            return Sample(row=assemble(dataset, pieces, length), source=cursor.name)

        return make if self._pool is None else self._pool.submit(make).result

    def _plan(self, make: Callable[[], Window]) -> Callable[[], Window]:
        return make if self._planner is None else self._planner.submit(make).result


class _Cursor:
    """Goes through one source's windows, row by row; the next window is planned while this one is read."""

    def __init__(
        self,
        name: str,
        stream: Stream,
        batching: Batching,
        bookmark: Bookmark,
        plan: Callable[[Callable[[], Window]], Callable[[], Window]],
    ) -> None:
        self.name, self.stream, self.batching, self.bookmark = name, stream, batching, bookmark
        self._plan = plan
        self._window: Window | None = None
        self._next: Callable[[], Window] | None = None

    def open(self) -> None:
        """Has the first window planned; a window that was being read must be as it was."""
        self._next = self._planned(self.bookmark.begin)
        if self.bookmark.rows:
            self._window = self._next()
            if self._window.end != self.bookmark.end or self.bookmark.rows > self._window.rows:
                raise ValueError(
                    f"source {self.name!r}: its window from token {self.bookmark.begin:,} ends at {self._window.end:,}, not at "
                    f"{self.bookmark.end:,} as when the run stopped: give it the data, length and packing it had, or start a new run"
                )
            self._next = self._planned(self._window.end)

    def take(self) -> tuple[Window, int]:
        """The next row: its window and its number in there."""
        mark, window = self.bookmark, self._window
        if window is None or mark.rows == window.rows:
            begin = mark.end if window is not None else mark.begin
            window = (self._next or self._planned(begin))()
            self._window, self._next = window, self._planned(window.end)
            mark = replace(mark, begin=window.begin, end=window.end, rows=0)
        self.bookmark = replace(
            mark,
            rows=mark.rows + 1,
            turns=mark.turns + 1,
            tokens=mark.tokens + int(window.tokens[mark.rows]),
            split=mark.split + int(window.split[mark.rows]),
        )
        return window, mark.rows

    def _planned(self, begin: int) -> Callable[[], Window]:
        b = self.batching

        def make() -> Window:
            return plan_window(self.stream, begin, length=b.length, packing=b.packing, window_tokens=b.window_tokens)

        return self._plan(make)
