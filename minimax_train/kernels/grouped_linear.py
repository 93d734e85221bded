"""A linear map for each group of rows: the matrix products of a mixture's experts.

    y_e = x_e W_e^T, x_e the rows of expert e        dx_e = dy_e W_e        dW_e = dy_e^T x_e

Rows are sorted by expert. Neither form is differentiable: the three are each other's gradients.

loop      the definition, a product for each expert
grouped   torch's grouped product, one launch for all (grouped_mm; CUTLASS on a GPU), which reads where experts end on the device and wants
          the rows of each in a multiple of 8
te        Transformer Engine's: cuBLAS, a product for each expert on streams side by side; only where it is asked for

On a GPU "grouped" and "te" have never been run; "te" is written from Transformer Engine's sources of 2.0 to 2.9 and later.
"""

import importlib.util
import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

BACKENDS = ("loop", "grouped", "te")
Asked = Literal["auto", "loop", "grouped", "te"]
ROWS = 8
"""Rows of an expert come in multiples of this for "grouped": 16 bytes of bf16 along the axis that the weights' gradient sums over. An
expert without rows has as many of zeros, for a sum over nothing is not written."""


def grouped_backend(asked: Asked, device: torch.device, dtype: torch.dtype, *sizes: int) -> str:
    """The form that is asked for; "auto": "grouped" where nothing hinders it, else "loop". `sizes`: inputs and outputs.

    ValueError, in one line, where the form cannot run here.
    """
    if asked == "auto":
        return "loop" if hindrance("grouped", device, dtype, *sizes) else "grouped"
    reason = hindrance(asked, device, dtype, *sizes)
    if reason is not None:
        others = ", ".join(name for name in BACKENDS if hindrance(name, device, dtype, *sizes) is None)
        raise ValueError(f"experts_backend {asked!r} {reason}; choose auto or one of {others}")
    return asked


def hindrance(backend: str, device: torch.device, dtype: torch.dtype, *sizes: int) -> str | None:
    """Why `backend` cannot run here, None if it can. ValueError for a backend there is not."""
    rows_multiple(backend)
    if backend == "loop":
        return None
    if device.type != "cuda" or dtype != torch.bfloat16:
        return f"takes bfloat16 on a GPU, not {dtype} on {device.type}"
    if any(size % 8 for size in sizes):
        return f"takes inputs and outputs in multiples of 8, not {', '.join(map(str, sizes))}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return None if backend == "grouped" or importlib.util.find_spec("transformer_engine") else "is not installed here"


def rows_multiple(backend: str) -> int:
    """What the rows of each expert must be a multiple of. ValueError for a backend there is not."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} of grouped_linear is unknown; choose one of {', '.join(BACKENDS)}")
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
    if bounds.backend == "te":
        return _transformer_engine("TN", list(weight), x, x.new_empty((len(x), weight.shape[1])), bounds)
    return _loop(x, weight.transpose(1, 2), bounds)


def grouped_linear_input_gradient(dy: Tensor, weight: Tensor, bounds: Bounds) -> Tensor:
    """dy `[R, out]`, weight `[E, out, in]` -> `[R, in]`."""
    if bounds.backend == "grouped":
        return _product(dy, weight, bounds)
    if bounds.backend == "te":
        return _transformer_engine("NN", list(weight), dy, dy.new_empty((len(dy), weight.shape[2])), bounds)
    return _loop(dy, weight, bounds)


def grouped_linear_weight_gradient(dy: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
    """dy `[R, out]`, x `[R, in]` -> `[E, out, in]`; zeros for an expert without rows."""
    if bounds.backend == "grouped":
        return _product(dy.t(), x, bounds)
    if bounds.backend == "te":
        shape = (len(bounds.counts), dy.shape[1], x.shape[1])
        result = x.new_empty(shape) if all(bounds.counts) else x.new_zeros(shape)  # whether it writes a sum over nothing is its affair
        return _transformer_engine("NT", list(x.contiguous().split(bounds.counts)), dy, result, bounds)
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


def _transformer_engine(layout: str, a: list[Tensor], rows: Tensor, result: Tensor, bounds: Bounds) -> Tensor:
    """Fills `result` with products of each expert's `a` and rows; in BLAS's letters, read by columns, "TN" is rows a^T, "NN" rows a, and
    "NT" rows^T a, one for each expert."""
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    experts = len(bounds.counts)
    options: dict[str, Any] = {"quantization_params": [None] * experts}
    if "workspaces" in inspect.signature(general_grouped_gemm).parameters:  # until 2.9 they were the caller's
        from transformer_engine.pytorch.module.base import get_multi_stream_cublas_workspace

        options = {"workspaces": get_multi_stream_cublas_workspace()}
    general_grouped_gemm(
        a,
        list(rows.contiguous().split(bounds.counts)),
        list(result) if layout == "NT" else [result],
        out_dtype=result.dtype,
        layout=layout,
        m_splits=bounds.counts,
        grad=layout != "TN",
        single_output=layout != "NT",
        **options,
    )
    return result
