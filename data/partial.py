"""The hidden folder beside a dataset in the making: what a killed run leaves, and the next one goes on from."""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from data.commit import commit_files
from data.format import BLOCK, SUFFIXES, checksum_of, file_of
from data.shard import Facts, files_of, read_facts

WORK, LOCK = "work.json", "lock"


class Partial:
    """`.NAME.partial` beside PREFIX: finished shards, and the dataset's files as they are put together."""

    def __init__(self, folder: Path, prefix: Path) -> None:
        self.folder, self.prefix = folder, prefix
        self.stage = folder / prefix.name
        self.joined = 0
        """Shards that are at the beginning of the staged `.bin` and no longer in files of their own."""

    def finished(self) -> dict[int, Facts]:
        """Shards that are whole, by checksum; whatever else there is of shards is removed."""
        found: dict[int, Facts] = {}
        binary = file_of(self.stage, ".bin")
        position = self.joined = 0
        in_files = False
        for path in sorted(self.folder.glob("*.npz")):
            number = int(path.stem)
            ids, _ = files_of(self.folder, number)
            try:
                facts = read_facts(path)
            except ValueError:
                continue
            if ids.exists():
                in_files = True
                good = checksum_of(ids).xxh3_128 == facts.xxh3_128
            else:
                good = not in_files and number == self.joined and _digest(binary, position, facts.bytes) == facts.xxh3_128
                self.joined += good
                position += good * facts.bytes
                in_files |= not good
            if good:
                found[number] = facts
        self._keep(found, position)
        return found

    def _keep(self, found: dict[int, Facts], position: int) -> None:
        kept = {path for number in found for path in files_of(self.folder, number)} | {self.folder / WORK, self.folder / LOCK}
        binary = file_of(self.stage, ".bin")
        if position:
            with binary.open("r+b") as file:
                file.truncate(position)
            kept.add(binary)
        for path in set(self.folder.iterdir()) - kept:
            path.unlink()

    def join(self, count: int) -> None:
        """Puts shards 0 ... count-1 one after the other into the staged `.bin`, each shard's own file going as it is taken over."""
        with file_of(self.stage, ".bin").open("ab") as binary:
            for number in range(self.joined, count):
                ids, _ = files_of(self.folder, number)
                with ids.open("rb") as shard:
                    shutil.copyfileobj(shard, binary, BLOCK)
                binary.flush()
                ids.unlink()

    def commit(self) -> None:
        """Moves the staged files to PREFIX."""
        commit_files(self.stage, self.prefix, suffixes=[suffix for suffix in SUFFIXES if file_of(self.stage, suffix).exists()])


@contextmanager
def partial(prefix: Path, work: dict[str, str], say: Callable[[str], None], *, part: Path | None = None) -> Iterator[Partial]:
    """The partial folder of PREFIX for this very work; what another work left in it is thrown away, unless that is still running.

    `part`: the folder of a part of the dataset instead, which stays on success. On an interruption (Ctrl-C, a killed worker) the folder
    stays, as it does when this process is killed; on success and on any other failure it goes, so that a full disk is as empty as before.
    Raises ValueError when another process is at it.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    folder = part or prefix.with_name(f".{prefix.name}.partial")
    folder.mkdir(exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is preparing {prefix}; wait for it, or choose another prefix") from None
        _adopt(folder, work, say)
        try:
            yield Partial(folder, prefix)
        except (KeyboardInterrupt, ChildProcessError):
            say(f"{folder} keeps what is finished: the same call goes on from there; remove the folder to give it up")
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if part is None:
            shutil.rmtree(folder, ignore_errors=True)


def _adopt(folder: Path, work: dict[str, str], say: Callable[[str], None]) -> None:
    """Leaves nothing in the folder but what belongs to `work`."""
    record = folder / WORK
    try:
        there = json.loads(record.read_text())
    except (OSError, ValueError):
        there = None
    if there == work:
        return
    others = [path for path in folder.iterdir() if path.name != LOCK]
    if others:
        differing = [name for name, value in work.items() if (there or {}).get(name) != value]
        say(f"{folder}: left by a run with other {', '.join(differing)}; begun anew")
    for path in others:
        path.unlink()
    record.write_text(json.dumps(work, indent=1) + "\n")


def _digest(path: Path, start: int, size: int) -> str:
    digest = xxhash.xxh3_128()
    if path.exists():
        with path.open("rb") as file:
            file.seek(start)
            while size > 0 and (block := file.read(min(BLOCK, size))):
                digest.update(block)
                size -= len(block)
    return digest.hexdigest()
