"""Progress of a long task: a bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts bytes up to `total` and shows them on standard error; a context manager."""

    def __init__(self, label: str, total: int, *, quiet: bool = False, every: float = 10.0) -> None:
        self.label, self.total, self.quiet, self.every = label, total, quiet, every
        self.done = 0
        self.begin = self.said = time.monotonic()
        terminal = sys.stderr.isatty()
        self.plain = not terminal and not quiet
        self.bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=quiet or not terminal)

    def advance(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        self.bar.update(size)
        now = time.monotonic()
        if self.plain and now - self.said >= self.every:
            self.said = now
            rate = self.done / 1e6 / (now - self.begin)
            print(f"{self.label}: {self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB, {rate:.2f} MB/s", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """One line, whether there is a bar or not."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
