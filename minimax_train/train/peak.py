"""What the machine could do at best, so that a throughput becomes a utilisation."""

import time
from dataclasses import dataclass

import torch

from minimax_train.engine.session import Session

_PUBLISHED = {"H800": 989e12, "H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, NVIDIA's data sheets (SXM)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """FLOP/s of all ranks together, None where it is not known; and where the figure is from."""

    flops: float | None
    source: str


def peak_of(session: Session, dtype: torch.dtype) -> Peak:
    """What the session's ranks could do at best."""
    flops, source = peak_flops(session.device, dtype)
    return Peak(flops=None if flops is None else flops * session.groups.size, source=source)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """(FLOP/s of one rank, where the figure is from).

    On a CPU: the best of 5 products of 1024 x 1024 matrices with this process's threads. On a GPU: the data sheet's bf16 figure;
    None for a GPU that is not in the table.
    """
    if device.type == "cpu":
        return _measured(dtype), "measured: best of 5 matrix products of 1024 x 1024"
    name = torch.cuda.get_device_name(device)
    for model, flops in _PUBLISHED.items():
        if model in name:
            return flops, f"data sheet, bf16, {model}"
    return None, f"unknown for {name}"


def _measured(dtype: torch.dtype) -> float:
    a = torch.randn(1024, 1024).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
