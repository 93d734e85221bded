# mypy: disallow-untyped-defs=False
"""RMSNorm times a sigmoid gate on a GPU: gated_norm.define in fp32, one read of every input and one write of every output a pass.

    S = sum_c x_c^2        r = 1 / sqrt(S / C + eps)    n_c = x_c r    s_c = sigmoid(g_c)    y_c = w_c n_c s_c
    d = sum_c dy_c s_c w_c n_c
    dx_c = r (dy_c s_c w_c - n_c d / C)        dg_c = dy_c s_c w_c n_c (1 - s_c)        dw_c = sum_t dy_c s_c n_c

S and d are the only sums over channels. Where tensor parallelism cuts the channels, a rank computes its share of each, the shares are
added over the ranks, and `normalise` and `gradients` take the totals. dw is added up in fixed parts, in one order: always the same bits.
Legend: T tokens, C channels of all shards; x, gate, dy are `[T, C]` or a shard of it, with contiguous channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PARTS = 264  # programs of the backward, each with its own sum of dw: two on each multiprocessor of an H100


@triton.jit
def _row(pointer, row, stride, c, inside):
    return tl.load(pointer + row.to(tl.int64) * stride + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def square_rows(x, squares, shard, stride_x, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    wide = _row(x, row, stride_x, c, c < shard)
    tl.store(squares + row, tl.sum(wide * wide))


@triton.jit
def norm_rows(x, gate, weight, y, squares, shard, channels, eps, stride_x, stride_g, BLOCK: tl.constexpr, GIVEN: tl.constexpr):
    """A row a program; `shard` channels are here. GIVEN: `squares` are read; else they are this row's, and written."""
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    inside = c < shard
    wide = _row(x, row, stride_x, c, inside)
    if GIVEN:
        total = tl.load(squares + row)
    else:
        total = tl.sum(wide * wide)
        tl.store(squares + row, total)
    r = 1.0 / tl.sqrt(total / channels + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    out = wide * r * w * tl.sigmoid(_row(gate, row, stride_g, c, inside))
    tl.store(y + row.to(tl.int64) * shard + c, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def dot_rows(x, gate, weight, dy, squares, dots, shard, channels, eps, stride_x, stride_g, stride_dy, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    inside = c < shard
    r = 1.0 / tl.sqrt(tl.load(squares + row) / channels + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    scaled = _row(dy, row, stride_dy, c, inside) * tl.sigmoid(_row(gate, row, stride_g, c, inside)) * w
    tl.store(dots + row, tl.sum(scaled * _row(x, row, stride_x, c, inside) * r))


@triton.jit(do_not_specialize=["rows"])
def back_rows(x, gate, weight, dy, squares, dots, dx, dgate, parts, rows, shard, channels, eps, stride_x, stride_g, stride_dy,
              BLOCK: tl.constexpr, GIVEN: tl.constexpr):  # fmt: skip
    """Program p takes rows p, p + programs, ... and adds up their dw in `parts` `[programs, shard]`. GIVEN: `dots` are read."""
    p, c = tl.program_id(0), tl.arange(0, BLOCK)
    inside = c < shard
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for i in range(p, rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        r = 1.0 / tl.sqrt(tl.load(squares + row) / channels + eps)
        n = _row(x, row, stride_x, c, inside) * r
        s = tl.sigmoid(_row(gate, row, stride_g, c, inside))
        dys = _row(dy, row, stride_dy, c, inside) * s
        dw += dys * n
        each = dys * n * w
        if GIVEN:
            d = tl.load(dots + row)
        else:
            d = tl.sum(each)
        at = row * shard + c
        tl.store(dgate + at, (each * (1.0 - s)).to(dgate.dtype.element_ty), mask=inside)
        tl.store(dx + at, ((dys * w - n * (d / channels)) * r).to(dx.dtype.element_ty), mask=inside)
    tl.store(parts + p * shard + c, dw, mask=inside)


def _layout(shard: int) -> dict[str, int]:
    """One row in registers: 16 columns a thread, 4 to 16 warps (fewer would spill)."""
    block = triton.next_power_of_2(shard)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 4), 16)}


def sum_of_squares(x_TC: Tensor) -> Tensor:
    """S of the channels given, `[T]` fp32."""
    squares = x_TC.new_empty(len(x_TC), dtype=torch.float32)
    square_rows[(len(x_TC),)](x_TC, squares, x_TC.shape[1], x_TC.stride(0), **_layout(x_TC.shape[1]))
    return squares


def normalise(
    x_TC: Tensor, gate_TC: Tensor, weight_C: Tensor, squares_T: Tensor | None, channels: int, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, S `[T]` fp32): S over all `channels`, of which a shard may be here; computed from x where it is None and x is whole."""
    rows, shard = x_TC.shape
    y, squares = x_TC.new_empty(x_TC.shape), x_TC.new_empty(rows, dtype=torch.float32) if squares_T is None else squares_T
    norm_rows[(rows,)](
        x_TC, gate_TC, weight_C, y, squares, shard, channels, eps, x_TC.stride(0), gate_TC.stride(0), GIVEN=squares_T is not None,
        **_layout(shard),
    )  # fmt: skip
    return y, squares


def row_dot(x_TC: Tensor, gate_TC: Tensor, weight_C: Tensor, dy_TC: Tensor, squares_T: Tensor, channels: int, eps: float) -> Tensor:
    """d of the channels given, `[T]` fp32."""
    rows, shard = x_TC.shape
    dots = x_TC.new_empty(rows, dtype=torch.float32)
    dot_rows[(rows,)](
        x_TC, gate_TC, weight_C, dy_TC, squares_T, dots, shard, channels, eps, x_TC.stride(0), gate_TC.stride(0), dy_TC.stride(0),
        **_layout(shard),
    )  # fmt: skip
    return dots


def gradients(
    x_TC: Tensor, gate_TC: Tensor, weight_C: Tensor, dy_TC: Tensor, squares_T: Tensor, dots_T: Tensor | None, channels: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dgate, dweight; d over all `channels` `[T]` fp32, computed here where it is None and the channels are whole."""
    rows, shard = x_TC.shape
    dx, dgate = x_TC.new_empty(x_TC.shape), gate_TC.new_empty(gate_TC.shape)
    parts = x_TC.new_empty((min(rows, PARTS), shard), dtype=torch.float32)
    back_rows[(len(parts),)](
        x_TC, gate_TC, weight_C, dy_TC, squares_T, squares_T if dots_T is None else dots_T, dx, dgate, parts, rows, shard, channels, eps,
        x_TC.stride(0), gate_TC.stride(0), dy_TC.stride(0), GIVEN=dots_T is not None, **_layout(shard),
    )  # fmt: skip
    return dx, dgate, parts.sum(0).to(weight_C.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x and gate `[T, C]` of one dtype of bf16, fp16, fp32, weight `[C]`; returns `[T, C]` in that dtype. Differentiable."""
    y: Tensor = _GatedNorm.apply(x, gate, weight, eps)
    return y


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, gate = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, gate))
        with torch.cuda.device_of(x):
            y, squares = normalise(x, gate, weight, None, x.shape[1], eps)
        ctx.save_for_backward(x, gate, weight, squares)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gate, weight, squares = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        with torch.cuda.device_of(x):
            return *gradients(x, gate, weight, dy, squares, None, x.shape[1], ctx.eps), None
