"""CPU time and memory of a command and everything it starts."""

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
EVERY = 0.05
"""Seconds between two looks at the memory."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of a whole process tree. `peak_mb` is the greatest sum over processes of resident memory, pages they share counted in each."""

    wall_seconds: float
    cpu_seconds: float
    peak_mb: float


def run(command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> Usage:
    """Runs to its end, and to that of what it left behind. Raises RuntimeError with the end of its output when it fails."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans, such as a fork server, come to this process and are counted
    begin, peak = time.monotonic(), 0
    with log.open("wb") as output:
        child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
        root = psutil.Process(child.pid)
        seconds = 0.0
        with contextlib.suppress(ChildProcessError):  # none left
            while True:
                done, status, used = os.wait4(-1, os.WNOHANG)
                if not done:
                    peak = max(peak, _memory(root))
                    time.sleep(EVERY)
                    continue
                seconds += used.ru_utime + used.ru_stime
                if done == child.pid:
                    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {child.returncode}: {log.read_text(errors='replace')[-2000:]}")
    return Usage(wall_seconds=time.monotonic() - begin, cpu_seconds=seconds, peak_mb=peak / 1e6)


def _memory(root: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total
