"""What a figure was measured on, and how two things are timed side by side."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, memory, versions, threads and date of this run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "megatron-core")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of CPU time of this process: median, least and most over the repeats."""

    median: float
    least: float
    most: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two things timed in turn."""

    ours: Timing
    theirs: Timing
    ratio: float
    """Median over pairs of theirs / ours: how many times faster ours is."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(ours: Callable[[], object], theirs: Callable[[], object], *, repeats: int, warm_up: int = 1) -> Comparison:
    """Times both in alternation, the first of each pair changing, by process CPU time (threads must be 1)."""
    for _ in range(warm_up):
        ours()
        theirs()
    pairs = []
    for repeat in range(repeats):
        order = (ours, theirs) if repeat % 2 == 0 else (theirs, ours)
        seconds = {work: cpu_seconds(work) for work in order}
        pairs.append((seconds[ours], seconds[theirs]))
    return Comparison(
        ours=_timing([a for a, _ in pairs]), theirs=_timing([b for _, b in pairs]), ratio=statistics.median(b / a for a, b in pairs)
    )


def measure(work: Callable[[], object], *, repeats: int, warm_up: int = 1) -> Timing:
    """Times one thing."""
    for _ in range(warm_up):
        work()
    return _timing([cpu_seconds(work) for _ in range(repeats)])


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time this process spends in `work`: what other processes do hardly matters."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _timing(seconds: list[float]) -> Timing:
    return Timing(median=statistics.median(seconds), least=min(seconds), most=max(seconds), repeats=len(seconds))
