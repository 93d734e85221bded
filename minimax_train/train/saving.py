"""Checkpoints of a run while it goes on: one at a time is being written, and committed behind the step after which all ranks' parts are."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minimax_train.checkpoint.record import Record
from minimax_train.checkpoint.store import Save
from minimax_train.engine.shard_writer import SILENT, Pinned
from minimax_train.engine.state import Sharded
from parallel.groups import Groups

MOST_FAILED = 3
"""Saves in a row that may fail; at one more the run stops. Ours."""


@dataclass(frozen=True, kw_only=True)
class Votes:
    """What a rank says of the save in flight, for a sum over the ranks."""

    busy: float
    failed: float


class Saver:
    """All ranks call its methods alike, `votes` and `stall` apart."""

    def __init__(self, groups: Groups, committed: Callable[[Path], None], failed: Callable[[str], None], *, silent: float = SILENT) -> None:
        """`committed` hears of every checkpoint that appeared, `failed` of every one that did not, on all ranks."""
        self._groups, self._committed, self._failed, self._silent = groups, committed, failed, silent
        self._saving: Save | None = None
        self._in_a_row, self._stalled = 0, 0.0
        self._pinned = Pinned()

    def begin(self, final: Path, state: Sharded, record: Record, *, wait: bool) -> None:
        """Writes `state` as it is now, once the save before is through. `wait`: OSError on every rank unless it was committed on return."""
        start = time.perf_counter()
        self.wait()
        try:
            self._saving = Save(final, state, record, self._groups, self._pinned)
        except OSError as error:
            if wait:
                raise
            self._give_up(str(error))
        if wait:
            self._finish()
        self._stalled += time.perf_counter() - start

    def wait(self) -> None:
        """For the save in flight, if there is one: committed or failed on return."""
        start = time.perf_counter()
        if self._saving is not None:
            try:
                self._finish()
            except OSError as error:
                self._give_up(str(error))
        self._stalled += time.perf_counter() - start

    def votes(self) -> Votes:
        """This rank's."""
        if self._saving is None:
            return Votes(busy=0.0, failed=0.0)
        failure = self._saving.failure(self._silent)
        return Votes(busy=float(self._saving.busy), failed=float(failure is not None))

    def count(self, votes: Votes) -> None:
        """`votes`: the sums. Commits where all are done, gives up where one has failed."""
        if self._saving is not None and (votes.failed or not votes.busy):
            self.wait()

    def stall(self) -> float:
        """Seconds that this rank was held up by saves since it was last asked."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    def close(self) -> None:
        """Where the run ends otherwise than well: no process is left."""
        if self._saving is not None:
            self._saving.drop()
            self._saving = None

    def _finish(self) -> None:
        assert self._saving is not None
        saving, self._saving = self._saving, None
        saving.finish(self._silent)
        self._in_a_row = 0
        self._committed(saving.final)

    def _give_up(self, why: str) -> None:
        self._in_a_row += 1
        self._failed(why)
        if self._in_a_row > MOST_FAILED:
            raise OSError(f"{why}; so it was with the {MOST_FAILED} before: the run stops")
