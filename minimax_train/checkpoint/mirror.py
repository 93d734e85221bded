"""Copies of a run's checkpoints in a second place, made by a process of their own while training goes on. The first rank's alone.

That process is `minimax-train checkpoint copy`; it says how far it is, and is given up where it says nothing for SILENT seconds. Where
copying is slower than saving, checkpoints are left out: the newest always comes.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from minimax_train.checkpoint.commit import remove_leftovers, replace_text
from minimax_train.checkpoint.manifest import NAME
from minimax_train.checkpoint.shelf import prune, set_aside
from minimax_train.plan import Checkpoints

SILENT = 300.0
"""Seconds without a byte copied after which a copy is given up. Ours: archives are slow."""
LOOK = 0.02
"""Seconds between two looks at a copy that is waited for."""
OWNER = "run"
"""A file that says whose copies they are."""


def mirror_of(keep: Checkpoints, run: Path) -> Path | None:
    """Where copies of the run's checkpoints lie, if its plan asks for them."""
    return None if keep.mirror is None else Path(keep.mirror) / run.resolve().name


def claim(place: Path, run: Path) -> None:
    """Makes the folder the run's. ValueError where it is another's, or cannot be made."""
    owner, ours = place / OWNER, str(run.resolve())
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not owner.exists():
            replace_text(owner, ours + "\n")
        theirs = owner.read_text().strip()
    except OSError as error:
        raise ValueError(f"checkpoints.mirror: {place} cannot be used: {error.strerror}") from None
    if theirs != ours:
        raise ValueError(
            f"checkpoints.mirror: {place} has copies of another run's checkpoints, {theirs}: choose another one, or, where the run {ours} "
            f"was moved from there, remove {owner}"
        )
    remove_leftovers(place)


class Mirror:
    """What is being copied, and what comes next."""

    def __init__(self, place: Path, keep: Checkpoints, tell: Callable[[str], None], silent: float = SILENT) -> None:
        """`tell` hears of every copy that failed; training goes on."""
        self.place, self._keep, self._tell, self._silent = place, keep, tell, silent
        self._now: Path | None = None
        self._next: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def needed(self) -> set[Path]:
        """Checkpoints that are read, or will be: nobody may remove them."""
        return {path for path in (self._now, self._next) if path is not None}

    def copy(self, checkpoint: Path) -> None:
        """As soon as what is being copied now is through, unless a newer one comes before; nothing where it is there already."""
        self._next = checkpoint
        self.look()

    def look(self) -> None:
        """Ends what is through or says nothing, and begins what is next. Never waits."""
        if self._process is not None and self._goes_on():
            return
        if self._process is not None:
            self._end()
        if self._next is not None:
            self._now, self._next = self._next, None
            self._begin(self._now)

    def finish(self, seconds: float) -> None:
        """Waits until everything is through or was given up, but so long at most."""
        end = time.monotonic() + seconds
        while self.needed and time.monotonic() < end:
            self.look()
            time.sleep(LOOK)
        for checkpoint in sorted(self.needed):
            self._tell(f"{checkpoint} was not copied to {self.place} within {seconds:g} s of the end: `checkpoint copy` does it")
        self.close()

    def close(self) -> None:
        """Ends the copy that is under way; nothing of it is left, and nothing follows. The run goes on with the newest when it is called
        again."""
        self._next = None
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = self._now = None
            with contextlib.suppress(OSError):
                remove_leftovers(self.place)

    def _begin(self, checkpoint: Path) -> None:
        final = self.place / checkpoint.name
        command = [sys.executable, "-m", "minimax_train.cli", "checkpoint", "copy", str(checkpoint), "--to", str(final)]
        try:
            if final.exists() and (final / NAME).read_bytes() == (checkpoint / NAME).read_bytes():
                self._now = None
                return
            if final.exists():  # of steps that were made anew since
                set_aside(final, "replaced")
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors)
        except OSError as error:
            self._tell(f"{checkpoint} was not copied to {final}: {error.strerror}; training goes on")
            self._now = None
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._heard = time.monotonic()

    def _goes_on(self) -> bool:
        assert self._process is not None and self._process.stdout is not None
        ended = self._process.poll() is not None
        if self._process.stdout.read():
            self._heard = time.monotonic()
        if not ended and time.monotonic() - self._heard > self._silent:
            self._process.kill()
            self._process.wait()
            self._errors.write(f"nothing was copied for {self._silent:g} s".encode())
            ended = True
        return not ended

    def _end(self) -> None:
        assert self._process is not None and self._now is not None
        final, status = self.place / self._now.name, self._process.returncode
        self._process.communicate()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        try:
            if status == 0:
                prune(self.place, self._keep.keep, self._keep.keep_every_tokens, verified=final)
            else:
                self._tell(f"{self._now} was not copied to {final} ({said or f'exit status {status}'}); training goes on")
                remove_leftovers(self.place)
        except OSError as error:
            self._tell(f"{self.place}: {error}; training goes on")
        self._process = self._now = None
