# mypy: disallow-untyped-defs=False
"""Rotary embedding on a GPU: one read and one write. Its gradient is the rotation by the negative angle."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

NUMBERS, WARPS = 4096, 4  # of one program: 32 numbers a thread, so that 16-bit ones are loaded eight at a time


@triton.jit(do_not_specialize=["rows"])
def turn(x, cos, sin, y, rows, stride_t, stride_h, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
         BLOCK: tl.constexpr, REST: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """ROWS heads, of one token or of several; row = token * H + head. BLOCK and REST: the next powers of 2 of HALF and of the channels
    that pass through (0: none)."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    n = tl.arange(0, ROWS)
    from_token = (start % H).to(tl.int32) + n
    t, h = start // H + from_token // H, (from_token % H).to(tl.int64)
    there = (start + n < rows)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    here = there & (i < HALF)
    c = tl.load(cos + t[:, None] * HALF + i, mask=here, other=0.0)
    s = tl.load(sin + t[:, None] * HALF + i, mask=here, other=0.0)
    if BACK:
        s = -s
    source = x + t[:, None] * stride_t + h[:, None] * stride_h
    target = y + (start + n)[:, None] * D
    first = tl.load(source + i, mask=here, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + i, mask=here, other=0.0).to(tl.float32)
    tl.store(target + i, (first * c - second * s).to(y.dtype.element_ty), mask=here)
    tl.store(target + HALF + i, (second * c + first * s).to(y.dtype.element_ty), mask=here)
    if REST:
        j = 2 * HALF + tl.arange(0, REST)[None, :]
        here = there & (j < D)
        tl.store(target + j, tl.load(source + j, mask=here, other=0.0), mask=here)


def _turn(x_THD: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x_THD = x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
    tokens, heads, size = x_THD.shape
    half, y = cos.shape[-1], x_THD.new_empty(x_THD.shape)
    rest = size - 2 * half
    rows = max(NUMBERS // triton.next_power_of_2(size), 1)
    with torch.cuda.device_of(x_THD):
        turn[(triton.cdiv(tokens * heads, rows),)](
            x_THD, cos, sin, y, tokens * heads, x_THD.stride(0), x_THD.stride(1), H=heads, D=size, HALF=half, ROWS=rows,
            BLOCK=triton.next_power_of_2(half), REST=triton.next_power_of_2(rest) if rest else 0, BACK=back, num_warps=WARPS,
        )  # fmt: skip
    return y


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dtype == torch.float64 or cos.shape != sin.shape or cos.shape[:2] != (len(x), 1) or not 0 < 2 * cos.shape[2] <= x.shape[2]:
        raise ValueError(
            f"rotate in Triton was given x {x.dtype} {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}; it takes bf16, fp16 or "
            "fp32 [tokens, heads, size] with cos and sin [tokens, 1, half], 2 half <= size"
        )


class Rotary(torch.autograd.Function):
    """rotary.define."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        _check(x, cos, sin)
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _turn(dy, *ctx.saved_tensors, back=True), None, None
