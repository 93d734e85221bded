# mypy: disallow-untyped-defs=False
"""Rotary embedding on a GPU: one read and one write. Its gradient is the rotation by the negative angle."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

HEADS = 8  # that one program turns


@triton.jit
def turn(x, cos, sin, y, heads, stride_t, stride_h, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
         BACK: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """BLOCK and REST: the next powers of 2 of HALF and of the channels that pass through (0: none)."""
    t, h, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    here = (h < heads)[:, None] & (i < HALF)[None, :]
    c = tl.load(cos + t * HALF + i, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + t * HALF + i, mask=i < HALF, other=0.0)[None, :]
    if BACK:
        s = -s
    source = x + t * stride_t + h[:, None] * stride_h
    target = y + (t * heads + h[:, None]) * D
    first = tl.load(source + i[None, :], mask=here, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + i[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(target + i[None, :], (first * c - second * s).to(y.dtype.element_ty), mask=here)
    tl.store(target + HALF + i[None, :], (second * c + first * s).to(y.dtype.element_ty), mask=here)
    if REST:
        j = 2 * HALF + tl.arange(0, REST)
        here = (h < heads)[:, None] & (j < D)[None, :]
        tl.store(target + j[None, :], tl.load(source + j[None, :], mask=here, other=0.0), mask=here)


def _turn(x_THD: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x_THD = x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
    tokens, heads, size = x_THD.shape
    half, y = cos.shape[-1], x_THD.new_empty(x_THD.shape)
    rest = size - 2 * half
    with torch.cuda.device_of(x_THD):
        turn[(tokens, triton.cdiv(heads, HEADS))](
            x_THD, cos, sin, y, heads, x_THD.stride(0), x_THD.stride(1), D=size, HALF=half, BLOCK=triton.next_power_of_2(half),
            REST=triton.next_power_of_2(rest) if rest else 0, BACK=back, HEADS=HEADS, num_warps=4,
        )  # fmt: skip
    return y


class Rotary(torch.autograd.Function):
    """rotary.define."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _turn(dy, *ctx.saved_tensors, back=True), None, None
