"""A trace of two steps, where it was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def profiled(run: Path, rank: int, *, wanted: bool) -> Iterator[Any]:
    """A callable for the end of each step; where wanted, steps 3 and 4 are traced to RUN/profile/rank-N.json (Chrome's trace format)."""
    if not wanted:
        yield lambda: None
        return
    target = run / "profile"
    target.mkdir(exist_ok=True)
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(target / f"rank-{rank}.json"))) as p:
        yield p.step
