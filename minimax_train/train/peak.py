"""What the machine could do at best, so that a throughput becomes a utilisation."""

import time

import torch

_PUBLISHED = {"H800": 989e12, "H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, NVIDIA's data sheets (SXM)


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
