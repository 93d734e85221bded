"""Stopping between two steps because somebody asked: a job's time is nearly over, or a person wants the GPUs back."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

UNFINISHED = 75
"""Exit status of a run that stopped because it was asked to and has more to do (sysexits.h: EX_TEMPFAIL, try again later)."""


class Pause:
    """Whether a stop was asked for; a signal's handler does no more than say so."""

    asked = False


@contextmanager
def pause_on_signal(number: int = signal.SIGUSR1) -> Iterator[Pause]:
    """SIGUSR1 (or `number`) asks for a stop, inside the `with`. In the main thread alone."""
    pause = Pause()

    def ask(*_: object) -> None:
        pause.asked = True

    before = signal.signal(number, ask)
    try:
        yield pause
    finally:
        signal.signal(number, before)
