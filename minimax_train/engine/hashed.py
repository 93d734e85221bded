"""A new file whose checksum is known and whose bytes are on the disk when it is closed."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

PIECE = 1 << 26
"""Bytes after which it is shown that there is progress."""
BLOCK = 1 << 20
"""Bytes that are hashed and written while they are in the processor's cache."""
FLUSH_EVERY = 1 << 27
"""Bytes after which what was written is sent to the disk while more is being made; waiting for it at the end doubles the time."""


class Hashed:
    """A context manager; leaving it returns once everything is on the disk, or raises OSError where the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._digest, self._flush_at = xxhash.xxh3_128(), FLUSH_EVERY
        self._flushing: Future[None] | None = None

    def __enter__(self) -> "Hashed":
        self._file = self.path.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._thread.shutdown()
            if kind is None:
                if self._flushing is not None:
                    self._flushing.result()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: Any) -> int:
        """All of `data`, which may be any bytes."""
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):
            block = view[done : done + BLOCK]
            written = self._file.write(block)
            self._digest.update(block[:written])
            done += written
        self.size += len(view)
        if self.size >= self._flush_at:
            self._flush()
        return len(view)

    def _flush(self) -> None:
        if self._flushing is not None:
            if not self._flushing.done():
                return  # the disk is slower than the writer: one wait at a time
            self._flushing.result()  # what it raised
        self._flushing = self._thread.submit(os.fsync, self._file.fileno())
        self._flush_at = self.size + FLUSH_EVERY

    def flush(self) -> None:
        """Nothing waits to be written; torch.save asks."""

    def digest(self) -> str:
        """xxh3-128 of everything written, in hexadecimal."""
        return self._digest.hexdigest()


def read_back(path: Path, show: Callable[[int], None]) -> tuple[int, str]:
    """Size and xxh3-128 of what the disk has of a file, not of what memory still has. `show` hears of every PIECE."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(PIECE):
            digest.update(block)
            size += len(block)
            show(len(block))
    return size, digest.hexdigest()
