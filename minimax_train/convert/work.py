"""A conversion as jobs that any number of processes share, that survive SIGKILL, and whose result appears whole or not at all.

    .partial-NAME/          beside the target NAME, for as long as the conversion is unfinished
        identity.json       what is converted, and how: another conversion may not go on here
        locks/JOB           locked while a process does the job; the lock dies with its process
        done/JOB.json       what the job returned, once all it wrote is on the disk under its final name
        result/             becomes NAME by one rename

Whoever calls the same verb joins in: processes of one machine, or of several that share the disk.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.commit import sync
from data.progress import Progress
from data.workers import each
from minimax_train.checkpoint.commit import TEMPORARY

LOOK_AGAIN = 0.5
"""Seconds between looks at what other processes are doing."""


class FinishedElsewhereError(Exception):
    """Another process committed the target: there is nothing left to do."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to do once: `run` writes what it writes and returns what JSON can hold."""

    name: str
    bytes: int
    """Of its result: what progress counts."""
    run: Callable[[], dict[str, Any]]


class Work:
    """One conversion's folder."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.parent / f"{TEMPORARY}{target.name}"
        self.result = self.folder / "result"

    def begin(self, identity: dict[str, Any], needed: int) -> None:
        """Makes the folder, or joins what is there. ValueError where that is another conversion; OSError where the disk lacks room."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / "locks", self.folder / "done", self.result):
            folder.mkdir(exist_ok=True)
        note = self.folder / "identity.json"
        with claimed(self.folder / "locks" / "begin", wait=True):
            if note.exists():
                began = json.loads(note.read_text())
                different = sorted(key for key in began.keys() | identity.keys() if began.get(key) != identity.get(key))
                if different:
                    raise ValueError(
                        f"{self.folder} is an unfinished conversion that differs in {', '.join(different)}: finish that one, remove the "
                        "folder, or choose another --to"
                    )
                return
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                self.remove()
                raise OSError(f"{self.target} needs {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free there: nothing was written")
            write_whole(note, json.dumps(identity))

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
                result = self._done(job)  # it may have been done since the last look
                if result is None:
                    result = job.run()
                    write_whole(self.folder / "done" / f"{job.name}.json", json.dumps(result))
                return result
        except FileNotFoundError:
            self._gone()
            raise

    def _done(self, job: Job) -> dict[str, Any] | None:
        try:
            result: dict[str, Any] = json.loads((self.folder / "done" / f"{job.name}.json").read_text())
        except FileNotFoundError:
            return None
        return result

    def _gone(self) -> None:
        """Raises what it means that the folder is not there any more; returns where it is."""
        if not self.folder.exists():
            if self.target.exists():
                raise FinishedElsewhereError
            raise ValueError(f"another process gave up converting to {self.target}: see its message")

    def finish(self, complete: Callable[[Path], None]) -> None:
        """`complete` adds what is still missing from the result; then it is renamed to the target. By one process; all return after."""
        while True:
            try:
                with claimed(self.folder / "locks" / "finish") as mine:
                    if mine:
                        complete(self.result)
                        for folder in (*(p for p in self.result.rglob("*") if p.is_dir()), self.result):
                            sync(folder)
                        self.result.rename(self.target)
                        sync(self.target.parent)
                        self.remove()
                        return
            except FileNotFoundError:
                self._gone()
                raise
            time.sleep(LOOK_AGAIN)

    def remove(self) -> None:
        """Leaves nothing of the conversion."""
        shutil.rmtree(self.folder, ignore_errors=True)


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
        work.remove()
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


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file whole, on the disk, or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
