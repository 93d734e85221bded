"""One dataset by several calls, on one machine or many: each encodes its share of the slices, a last one puts all together.

`.NAME.part-K-of-N` beside PREFIX holds the finished shards of share K until the last call takes them over. Slices are numbered by the input
alone (see `slices`), so the dataset is, byte for byte, that of one call.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.partial import LOCK, WORK, Partial

MOST = 10_000
"""Parts."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Every `count`-th slice, from the `number`-th on; numbers begin with 1."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= MOST:
            raise ValueError(f"part {self.number}/{self.count}: write K/N with 1 <= K <= N <= {MOST}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, piece: int) -> bool:
        """Whether the slice of this number (from 0) is in the share."""
        return piece % self.count == self.number - 1


def share_of(text: str) -> Share:
    """K/N as a Share; ValueError where it is none."""
    if not re.fullmatch(r"\d{1,6}/\d{1,6}", text, re.ASCII):
        raise ValueError(f"part {text!r}: write K/N with 1 <= K <= N <= {MOST}, such as 3/8")
    number, count = map(int, text.split("/"))
    return Share(number=number, count=count)


def folder_of(prefix: Path, share: Share) -> Path:
    """Where the shards of a share wait."""
    return prefix.with_name(f".{prefix.name}.part-{share.number}-of-{share.count}")


def work_of(work: dict[str, str], share: Share) -> dict[str, str]:
    """What the folder of a share says it is."""
    return {**work, "part": str(share)}


def gather(room: Partial, work: dict[str, str], count: int, say: Callable[[str], None]) -> None:
    """Moves the shards of the shares 1 to `count` of this very work into `room`, to be checked there like its own.

    A share that is not there, or is of another work, is told of by `say`: what it lacks is left to the caller. ValueError where a process
    is still at one.
    """
    for number in range(1, count + 1):
        share = Share(number=number, count=count)
        folder = folder_of(room.prefix, share)
        try:
            there = json.loads((folder / WORK).read_text())
        except (OSError, ValueError):
            there = None
        if there != work_of(work, share):
            say(f"{folder}: {'no such part' if there is None else 'a part of other work'}: its slices are encoded now")
            continue
        with (folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another process is preparing this part; wait for it") from None
            for suffix in (".ids", ".npz"):  # the facts last: a shard without them does not exist
                for path in sorted(folder.glob(f"*{suffix}")):
                    path.rename(room.folder / path.name)


def remove_parts(prefix: Path, count: int) -> None:
    """Once the dataset is there."""
    for number in range(1, count + 1):
        shutil.rmtree(folder_of(prefix, Share(number=number, count=count)), ignore_errors=True)
