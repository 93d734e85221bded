"""A linear map for each group of rows: the matrix products of a mixture's experts.

    y_e = x_e W_e^T, x_e the rows of expert e        dx_e = dy_e W_e        dW_e = dy_e^T x_e

Rows are sorted by expert. "loop" is the definition, a product for each expert; "grouped" is torch's grouped product, one launch for all
(grouped_mm; CUTLASS on a GPU), which reads where experts end on the device and wants the rows of each in a multiple of 8.
Neither is differentiable: the three are each other's gradients.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

BACKENDS = ("loop", "grouped")
ROWS = 8
"""Rows of an expert come in multiples of this for "grouped": 16 bytes of bf16 along the axis that the weights' gradient sums over. An
expert without rows has as many of zeros, for a sum over nothing is not written."""


def best_grouped_backend(device: torch.device, dtype: torch.dtype, *sizes: int) -> str:
    """ "grouped" for bf16 on a GPU since Ampere, where `sizes` (inputs and outputs) are multiples of 8; else "loop"."""
    fits = device.type == "cuda" and dtype == torch.bfloat16 and not any(size % 8 for size in sizes)
    return "grouped" if fits and torch.cuda.get_device_capability(device) >= (8, 0) else "loop"


def rows_multiple(backend: str) -> int:
    """What the rows of each expert must be a multiple of. ValueError for a backend there is not."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} of grouped_linear is unknown; choose 'loop' or 'grouped'")
    return ROWS if backend == "grouped" else 1


class Bounds:
    """Where the rows of each expert end, on the host and, for "grouped", int32 on the rows' device, copied without waiting."""

    def __init__(self, counts: Sequence[int], device: torch.device, backend: str) -> None:
        self.counts, self.backend = list(counts), backend
        if backend == "grouped":
            ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, pin_memory=device.type == "cuda")
            self.ends = ends.to(device, non_blocking=True)


def grouped_linear(x: Tensor, weight: Tensor, bounds: Bounds) -> Tensor:
    """x `[R, in]`, weight `[E, out, in]` -> `[R, out]`."""
    if bounds.backend == "grouped":
        return _product(x, weight.transpose(1, 2), bounds)
    return _loop(x, weight.transpose(1, 2), bounds)


def grouped_linear_input_gradient(dy: Tensor, weight: Tensor, bounds: Bounds) -> Tensor:
    """dy `[R, out]`, weight `[E, out, in]` -> `[R, in]`."""
    if bounds.backend == "grouped":
        return _product(dy, weight, bounds)
    return _loop(dy, weight, bounds)


def grouped_linear_weight_gradient(dy: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
    """dy `[R, out]`, x `[R, in]` -> `[E, out, in]`; zeros for an expert without rows."""
    if bounds.backend == "grouped":
        return _product(dy.t(), x, bounds)
    result = x.new_empty((len(bounds.counts), dy.shape[1], x.shape[1]))
    for out, d, rows in zip(result, dy.split(bounds.counts), x.split(bounds.counts), strict=True):
        torch.mm(d.T, rows, out=out)
    return result


def _loop(x: Tensor, matrices: Tensor, bounds: Bounds) -> Tensor:
    """Each expert's rows times its matrix, written where they belong: on a CPU fresh memory costs as much as the products."""
    result = x.new_empty((len(x), matrices.shape[2]))
    for out, rows, matrix in zip(result.split(bounds.counts), x.split(bounds.counts), matrices, strict=True):
        torch.mm(rows, matrix, out=out)
    return result


def _product(a: Tensor, b: Tensor, bounds: Bounds) -> Tensor:
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm  # the latter until torch 2.9
    result: Tensor = grouped_mm(a, b, offs=bounds.ends)
    return result
