# mypy: disallow-untyped-defs=False
"""RMSNorm times a sigmoid gate on a GPU: gated_norm.define in fp32, one read of every input and one write of every output a pass.

    S = sum_c x_c^2        r = 1 / sqrt(S / C + eps)    n_c = x_c r    s_c = sigmoid(g_c)    y_c = w_c n_c s_c
    d = sum_c dy_c s_c w_c n_c
    dx_c = r (dy_c s_c w_c - n_c d / C)        dg_c = dy_c s_c w_c n_c (1 - s_c)        dw_c = sum_t dy_c s_c n_c

S and d are the only sums over channels. Where tensor parallelism cuts the channels, a rank computes its share of each, the shares are
added over the ranks, and `normalise` and `gradients` take the totals. dw is added up in fixed parts, in one order: always the same bits.
Program p takes rows p, p + programs, ... and works on one in registers while the next is on its way to shared memory.
Legend: T tokens, C channels of all shards; x, gate, dy are `[T, C]` or a shard of it.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

WARPS = 132 * 32  # of all programs of the backward: 32 on each multiprocessor of an H100. Fixed: the parts of dw are the same on every GPU
STAGES = tl.constexpr(2)  # the row at work and the next


@triton.jit
def _row(pointer, row, stride, c, inside):
    return tl.load(pointer + row * stride + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def square_rows(x, squares, rows, shard, stride_x, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    for i in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(i, tl.int64)
        wide = _row(x, row, stride_x, c, c < shard)
        tl.store(squares + row, tl.sum(wide * wide))


@triton.jit(do_not_specialize=["rows"])
def norm_rows(x, gate, weight, y, squares, rows, shard, channels, eps, stride_x, stride_g, BLOCK: tl.constexpr, GIVEN: tl.constexpr):
    """`shard` channels are here. GIVEN: `squares` are read; else they are those of the rows here, and written."""
    c = tl.arange(0, BLOCK)
    inside = c < shard
    w = _row(weight, 0, 0, c, inside)
    for i in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(i, tl.int64)
        wide = _row(x, row, stride_x, c, inside)
        s = tl.sigmoid(_row(gate, row, stride_g, c, inside))
        if GIVEN:
            total = tl.load(squares + row)
        else:
            total = tl.sum(wide * wide)
            tl.store(squares + row, total)
        out = wide * (1.0 / tl.sqrt(total / channels + eps)) * w * s
        tl.store(y + row * shard + c, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def dot_rows(x, gate, weight, dy, squares, dots, rows, shard, channels, eps, stride_x, stride_g, stride_dy, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    inside = c < shard
    w = _row(weight, 0, 0, c, inside)
    for i in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(i, tl.int64)
        r = 1.0 / tl.sqrt(tl.load(squares + row) / channels + eps)
        scaled = _row(dy, row, stride_dy, c, inside) * tl.sigmoid(_row(gate, row, stride_g, c, inside)) * w
        tl.store(dots + row, tl.sum(scaled * _row(x, row, stride_x, c, inside) * r))


@triton.jit(do_not_specialize=["rows"])
def back_rows(x, gate, weight, dy, squares, dots, dx, dgate, parts, rows, shard, channels, eps, stride_x, stride_g, stride_dy,
              BLOCK: tl.constexpr, GIVEN: tl.constexpr):  # fmt: skip
    """Each program adds up the dw of its rows in `parts` `[programs, shard]`. GIVEN: `dots` are read; else they are the rows' own."""
    p, c = tl.program_id(0), tl.arange(0, BLOCK)
    inside = c < shard
    w = _row(weight, 0, 0, c, inside)
    dw = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(p, rows, tl.num_programs(0), num_stages=STAGES):
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
    tl.store(parts + tl.cast(p, tl.int64) * shard + c, dw, mask=inside)


def _layout(shard: int) -> dict[str, int]:
    """One row in registers: 16 columns a thread, 4 to 16 warps (fewer would spill)."""
    block = triton.next_power_of_2(shard)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 4), 16)}


def _programs(rows: int, shard: int) -> int:
    """Of the backward; the other passes, which need fewer registers and keep no parts, take twice as many."""
    return min(rows, WARPS // _layout(shard)["num_warps"])


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, those copied whose last dimension is not contiguous."""
    if tensors[0].dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"gated_rms_norm in Triton was given {tensors[0].dtype}; it takes bf16, fp16 or fp32: use gated_norm.define")
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def sum_of_squares(x_TC: Tensor) -> Tensor:
    """S of the channels given, `[T]` fp32."""
    (x,) = _rows(x_TC)
    rows, shard = x.shape
    squares = x.new_empty(rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        square_rows[(2 * _programs(rows, shard),)](x, squares, rows, shard, x.stride(0), **_layout(shard))
    return squares


def normalise(
    x_TC: Tensor, gate_TC: Tensor, weight_C: Tensor, squares_T: Tensor | None, channels: int, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, S `[T]` fp32): S over all `channels`, of which a shard may be here; computed from x where it is None and x is whole."""
    x, gate, weight = _rows(x_TC, gate_TC, weight_C)
    rows, shard = x.shape
    y, squares = x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32) if squares_T is None else squares_T
    with torch.cuda.device_of(x):
        norm_rows[(2 * _programs(rows, shard),)](
            x, gate, weight, y, squares, rows, shard, channels, eps, x.stride(0), gate.stride(0), GIVEN=squares_T is not None,
            **_layout(shard),
        )  # fmt: skip
    return y, squares


def row_dot(x_TC: Tensor, gate_TC: Tensor, weight_C: Tensor, dy_TC: Tensor, squares_T: Tensor, channels: int, eps: float) -> Tensor:
    """d of the channels given, `[T]` fp32; `squares_T` is S over all `channels`."""
    x, gate, weight, dy = _rows(x_TC, gate_TC, weight_C, dy_TC)
    rows, shard = x.shape
    dots = x.new_empty(rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        dot_rows[(2 * _programs(rows, shard),)](
            x, gate, weight, dy, squares_T, dots, rows, shard, channels, eps, x.stride(0), gate.stride(0), dy.stride(0), **_layout(shard)
        )  # fmt: skip
    return dots


def gradients(
    x_TC: Tensor, gate_TC: Tensor, weight_C: Tensor, dy_TC: Tensor, squares_T: Tensor, dots_T: Tensor | None, channels: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dgate, dweight; d over all `channels` `[T]` fp32, computed here where it is None and the channels are whole."""
    x, gate, weight, dy = _rows(x_TC, gate_TC, weight_C, dy_TC)
    rows, shard = x.shape
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    parts = x.new_empty((_programs(rows, shard), shard), dtype=torch.float32)
    with torch.cuda.device_of(x):
        back_rows[(len(parts),)](
            x, gate, weight, dy, squares_T, squares_T if dots_T is None else dots_T, dx, dgate, parts, rows, shard, channels, eps,
            x.stride(0), gate.stride(0), dy.stride(0), GIVEN=dots_T is not None, **_layout(shard),
        )  # fmt: skip
    return dx, dgate, parts.sum(0).to(weight.dtype)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, total: Callable[[Tensor], Tensor] | None = None, channels: int | None = None
) -> Tensor:
    """x and gate `[T, C]` of one dtype of bf16, fp16, fp32, weight `[C]`; returns `[T, C]` in that dtype. Differentiable.

    With `total`, C are this rank's of `channels` channels; it sums `[T]` fp32 over the ranks.
    """
    y: Tensor = _GatedNorm.apply(x, gate, weight, eps, total, x.shape[1] if channels is None else channels)
    return y


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, total: Any, channels: int) -> Tensor:
        y, squares = normalise(x, gate, weight, None if total is None else total(sum_of_squares(x)), channels, eps)
        ctx.save_for_backward(x, gate, weight, squares)
        ctx.eps, ctx.total, ctx.channels = eps, total, channels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, gate, weight, squares = ctx.saved_tensors
        rest = (ctx.channels, ctx.eps)
        dots = None if ctx.total is None else ctx.total(row_dot(x, gate, weight, dy, squares, *rest))
        return *gradients(x, gate, weight, dy, squares, dots, *rest), None, None, None
