"""Progress of a long task: a bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts bytes up to `total`, and tokens made of them, and shows both with their rates on standard error; a context manager."""

    def __init__(self, label: str, total: int, *, quiet: bool = False, every: float = 10.0) -> None:
        self.label, self.total, self.quiet, self.every = label, total, quiet, every
        self.done = self.skipped = self.tokens = 0
        self.begin = self.said = time.monotonic()
        terminal = sys.stderr.isatty()
        self.plain = not terminal and not quiet
        self.bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=quiet or not terminal)

    def advance(self, size: int, tokens: int = 0) -> None:
        """`size` more bytes are done, which gave `tokens`."""
        self.done += size
        self.tokens += tokens
        now = time.monotonic()
        seconds = max(now - self.begin, 1e-9)
        self.bar.set_postfix_str(f"{self.tokens / seconds / 1e6:.2f} Mtokens/s", refresh=False)
        self.bar.update(size)
        if self.plain and now - self.said >= self.every:
            self.said = now
            done, total = (self.skipped + self.done) / 1e6, self.total / 1e6
            rates = f"{self.done / 1e6 / seconds:.2f} MB/s" + (f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else "")
            print(f"{self.label}: {done:.1f} of {total:.1f} MB, {rates}", file=sys.stderr, flush=True)

    def passed(self, size: int) -> None:
        """`size` bytes were done earlier: they are counted, but not as speed."""
        self.skipped += size
        self.bar.total -= size

    def say(self, line: str) -> None:
        """One line, whether there is a bar or not."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
