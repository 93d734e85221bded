"""RMSNorm times a sigmoid gate: y = w * x * r * sigmoid(g), r = 1 / sqrt(mean(x^2) + eps), over the last axis.

What closes every lightning layer (arXiv 2501.08313 section 2). On a CPU it is bound by memory: one pass over blocks of rows that stay in
cache, forward and backward, instead of some twenty passes over whole tensors. Statistics and products are fp32 (fp64 for fp64).

Where tensor parallelism cuts the channels, two sums a row cross the ranks: of x^2 forward, and of dy w n sigmoid(g) backward, n = x r.
They are given as `total`, which adds its argument over the ranks; each then takes one more pass over its inputs.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

Total = Callable[[Tensor], Tensor]

ROWS = 256  # of 512 channels in fp32: half a megabyte a tensor


def define(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in torch's own operators."""
    return F.rms_norm(x, weight.shape, weight, eps) * torch.sigmoid(gate)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, total: Total | None = None, channels: int | None = None
) -> Tensor:
    """x and gate `[T, C]` of one dtype, weight `[C]`; returns `[T, C]` in that dtype. The best form for x's device.

    With `total`, C are this rank's of `channels` channels, and all ranks call it together: `total` takes `[T]` (fp32, or fp64 for fp64)
    and returns its sum over them.
    """
    channels = x.shape[1] if channels is None else channels
    if x.device.type != "cpu" and x.dtype != torch.float64 and importlib.util.find_spec("triton"):
        from minimax_train.kernels import gated_norm_triton

        return gated_norm_triton.gated_rms_norm(x, gate, weight, eps, total=total, channels=channels)
    if x.device.type != "cpu" and total is None:
        return define(x, gate, weight, eps)
    y: Tensor = _GatedNorm.apply(x, gate, weight, eps, total, channels)
    return y


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reciprocal(squares_T: Tensor, channels: int, eps: float) -> Tensor:
    """r `[T, 1]`."""
    return (squares_T[:, None] / channels + eps).rsqrt_()


def _terms(x: Tensor, gate: Tensor, dy: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n, sigmoid(g) and dy sigmoid(g) of a block of rows."""
    s = torch.sigmoid(_wide(gate))
    return _wide(x) * r, s, _wide(dy) * s


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gate: Tensor, weight: Tensor, eps: float, total: Total | None, channels: int) -> Tensor:
        y, w = torch.empty_like(x), _wide(weight)
        if total is None:
            squares = torch.empty(len(x), dtype=_wide(x[:0]).dtype, device=x.device)
        else:
            squares = total(torch.cat([_wide(a).square().sum(-1) for a in x.split(ROWS)]))
        for out, a, g, own in zip(*(t.split(ROWS) for t in (y, x, gate, squares)), strict=True):
            a = _wide(a)
            if total is None:
                torch.sum(a.square(), -1, out=own)
            out.copy_(torch.sigmoid(_wide(g)).mul_(a).mul_(_reciprocal(own, channels, eps)).mul_(w))
        ctx.save_for_backward(x, gate, weight, squares)
        ctx.eps, ctx.total, ctx.channels = eps, total, channels  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, gate, weight, squares = ctx.saved_tensors  # type: ignore[attr-defined]
        total, channels = ctx.total, ctx.channels  # type: ignore[attr-defined]
        dx, dgate, w, r_T1 = torch.empty_like(x), torch.empty_like(gate), _wide(weight), _reciprocal(squares, channels, ctx.eps)  # type: ignore[attr-defined]
        dweight, dots = torch.zeros_like(w), torch.empty_like(squares)
        blocks = list(zip(*(t.split(ROWS) for t in (x, gate, grads[0], r_T1, dots, dx, dgate)), strict=True))
        if total is not None:
            for a, g, dy, r, dot, *_ in blocks:
                n, _, dys = _terms(a, g, dy, r)
                torch.sum(dys.mul_(n).mul_(w), -1, out=dot)
            dots.copy_(total(dots))
        for a, g, dy, r, dot, da, dg in blocks:
            n, s, dys = _terms(a, g, dy, r)
            dys_n = dys * n
            dweight += dys_n.sum(0)
            dys_n.mul_(w)  # dy * s * n * w: the gate's gradient but for (1 - s), and what the norm projects out
            if total is None:
                torch.sum(dys_n, -1, out=dot)
            dg.copy_(dys_n.mul_(1 - s))
            da.copy_(dys.mul_(w).sub_(n.mul_(dot[:, None] / channels)).mul_(r))
        return dx, dgate, dweight.to(weight.dtype), None, None, None
