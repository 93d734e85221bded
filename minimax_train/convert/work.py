"""A conversion as jobs that any number of processes share, that survive SIGKILL, and whose result appears whole or not at all.

    .partial-NAME/          beside the target NAME, for as long as the conversion is unfinished
        identity.json       what is converted, and how: another conversion may not go on here
        locks/JOB           locked while a process does the job; the lock dies with its process
        done/JOB.json       what the job returned, once all it wrote is on the disk under its final name
        result/             becomes NAME by one rename

Whoever calls the same verb joins in: processes of one machine, or of several that share the disk.
"""

import contextlib
import fcntl
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.commit import sync
from data.progress import Progress
from data.workers import each
from minimax_train.checkpoint.commit import TEMPORARY, replace_text

LOOK_AGAIN = 0.5
"""Seconds between looks at what other processes are doing."""


class FinishedElsewhereError(Exception):
    """Another process committed the target: there is nothing left to do."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to do once: `run` writes `file`, if it writes one, and returns what JSON can hold, the file's size as `bytes` among it."""

    name: str
    bytes: int
    """Of its result: what progress counts."""
    run: Callable[[], dict[str, Any]]
    file: Path | None = None


class Work:
    """One conversion's folder."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.parent / f"{TEMPORARY}{target.name}"
        self.result = self.folder / "result"
        self.token = ""
        """Which of the folders that had this name, one after the other, is this conversion's."""

    def begin(self, identity: dict[str, Any], needed: int) -> None:
        """Makes the folder, or joins what is there. ValueError where that is another conversion; OSError where the disk lacks room;
        FinishedElsewhereError where another process has committed the target since this one looked."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError), claimed(self.folder / "locks" / "begin", wait=True):
                if self.target.exists():
                    self.remove()
                    raise FinishedElsewhereError
                self._join(identity, needed)
                return
            # another process removed the folder between two of these lines: once more

    def _join(self, identity: dict[str, Any], needed: int) -> None:
        """With the lock held: the folder is this conversion's on return. FileNotFoundError where the lock was of a folder that is gone."""
        note = self.folder / "identity.json"
        if note.exists():
            began = json.loads(note.read_text())
            self.token = began.pop("token")
            different = sorted(key for key in began.keys() | identity.keys() if began.get(key) != identity.get(key))
            if different:
                raise ValueError(
                    f"{self.folder} is an unfinished conversion that differs in {', '.join(different)}: finish that one, remove the "
                    "folder, or choose another --to"
                )
            return
        for part in ("done", "result"):  # of a folder that has no identity nothing is believed
            shutil.rmtree(self.folder / part, ignore_errors=True)
            (self.folder / part).mkdir()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            self.remove()
            raise OSError(f"{self.target} needs {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free there: nothing was written")
        self.token = uuid.uuid4().hex
        replace_text(note, json.dumps({**identity, "token": self.token}))

    def do(self, jobs: Sequence[Job], label: str, *, workers: int, quiet: bool = False) -> dict[str, dict[str, Any]]:
        """What every job returned, by its name, in their order; each is done once, here or by whoever else works in the folder."""
        todo, results = {job.name: job for job in jobs}, {}
        with Progress(label, sum(job.bytes for job in jobs), quiet=quiet) as progress:
            for job in jobs:
                if (known := self._done(job)) is not None:
                    results[job.name] = known
                    progress.passed(todo.pop(job.name).bytes)
            while todo:
                idle = True
                for name, result in each(lambda name: (name, self._attempt(todo[name])), list(todo), workers=min(workers, len(todo))):
                    if result is not None:
                        results[name] = result
                        progress.advance(todo.pop(name).bytes)
                        idle = False
                if todo and idle:
                    time.sleep(LOOK_AGAIN)
        return {job.name: results[job.name] for job in jobs}

    def _attempt(self, job: Job) -> dict[str, Any] | None:
        """The job's result, or None while another process is at it."""
        try:
            with claimed(self.folder / "locks" / job.name) as mine:
                if not mine:
                    return None
                self._check()
                result = self._done(job)  # it may have been done since the last look
                if result is None:
                    result = job.run()
                    if job.file is not None:
                        sync(job.file.parent)  # the name is on the disk before anybody is told
                    self._check()
                    replace_text(self.folder / "done" / f"{job.name}.json", json.dumps(result))
                return result
        except FileNotFoundError:
            self._check()
            raise

    def _done(self, job: Job) -> dict[str, Any] | None:
        """What a finished job returned; None where it is not finished, or its file is not there as it was written."""
        try:
            result: dict[str, Any] = json.loads((self.folder / "done" / f"{job.name}.json").read_text())
            if job.file is not None and job.file.stat().st_size != result["bytes"]:
                return None
        except FileNotFoundError:
            return None
        return result

    def _check(self) -> None:
        """Raises what it means where the folder is not this conversion's any more; returns where it is."""
        if self.target.exists():
            raise FinishedElsewhereError
        try:
            same = json.loads((self.folder / "identity.json").read_text())["token"] == self.token
        except FileNotFoundError:
            same = False
        if not same:
            raise ValueError(f"another process gave up converting to {self.target}: see its message")

    def finish(self, complete: Callable[[Path], None]) -> None:
        """`complete` adds what is still missing from the result; then it is renamed to the target. By one process; all return after."""
        while True:
            try:
                with claimed(self.folder / "locks" / "finish") as mine:
                    if mine:
                        self._check()
                        complete(self.result)
                        for folder in (*(p for p in self.result.rglob("*") if p.is_dir()), self.result):
                            sync(folder)
                        self.result.rename(self.target)
                        sync(self.target.parent)
                        self.remove()
                        return
            except FileNotFoundError:
                self._check()
                raise
            self._check()
            time.sleep(LOOK_AGAIN)

    def remove(self) -> None:
        """Leaves nothing of the conversion. Its folder first gets another name: what is removed piece by piece is found by nobody."""
        aside = self.folder.with_name(f"{TEMPORARY}removed-{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def give_up(self) -> None:
        """Removes the folder where it still is this conversion's."""
        try:
            self._check()
        except (ValueError, FinishedElsewhereError):
            return
        self.remove()


def refuse_existing(target: Path) -> None:
    """ValueError where something stands at `target`; what a process left that was killed right after its rename is removed."""
    if target.exists() or target.is_symlink():
        work = Work(target)
        if work.folder.exists() and not work.result.exists():
            work.remove()
        raise ValueError(f"{target} already exists and is never written over: remove it or choose another --to")


@contextmanager
def conversion(target: Path, identity: dict[str, Any], needed: int) -> Iterator[Work]:
    """The work folder of a conversion of `needed` bytes. Bad input found on the way (ValueError) removes it; after anything else, a full
    disk, Ctrl-C or SIGKILL, the same call goes on where it stopped."""
    work = Work(target)
    work.begin(identity, needed)
    try:
        yield work
    except ValueError:
        work.give_up()
        raise


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds the lock at `path` inside the `with`."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
