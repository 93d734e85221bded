"""RMSNorm times a sigmoid gate: y = w * x * r * sigmoid(g), r = 1 / sqrt(mean(x^2) + eps), over the last axis.

What closes every lightning layer (arXiv 2501.08313 section 2). On a CPU it is bound by memory: one pass over blocks of rows that stay in
cache, forward and backward, instead of some twenty passes over whole tensors. Statistics and products are fp32 (fp64 for fp64).
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

ROWS = 256  # of 512 channels in fp32: half a megabyte a tensor


def define(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in torch's own operators."""
    return F.rms_norm(x, weight.shape, weight, eps) * torch.sigmoid(gate)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x and gate `[T, C]` of one dtype, weight `[C]`; returns `[T, C]` in that dtype. The best form for x's device."""
    if x.device.type == "cpu":
        y: Tensor = _GatedNorm.apply(x, gate, weight, eps)
        return y
    if x.dtype != torch.float64 and importlib.util.find_spec("triton"):
        from minimax_train.kernels import gated_norm_triton

        return gated_norm_triton.gated_rms_norm(x, gate, weight, eps)
    return define(x, gate, weight, eps)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, w = torch.empty_like(x), _wide(weight)
        for out, a, g in zip(y.split(ROWS), x.split(ROWS), gate.split(ROWS), strict=True):
            a = _wide(a)
            r = (a.square().mean(-1, keepdim=True) + eps).rsqrt_()
            out.copy_(torch.sigmoid(_wide(g)).mul_(a).mul_(r).mul_(w))
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gate, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        dx, dgate, w = torch.empty_like(x), torch.empty_like(gate), _wide(weight)
        dweight = torch.zeros_like(w)
        tensors = (x, gate, grads[0], dx, dgate)
        for a, g, dy, da, dg in zip(*(t.split(ROWS) for t in tensors), strict=True):
            a, s, dy = _wide(a), torch.sigmoid(_wide(g)), _wide(dy)
            r = (a.square().mean(-1, keepdim=True) + ctx.eps).rsqrt_()  # type: ignore[attr-defined]
            n = a * r
            dys = dy * s
            dys_n = dys * n
            dweight += dys_n.sum(0)
            dys_n.mul_(w)  # dy * s * n * w: the gate's gradient but for (1 - s), and what the norm projects out
            projected = dys_n.mean(-1, keepdim=True)
            dg.copy_(dys_n.mul_(1 - s))
            da.copy_(dys.mul_(w).sub_(n.mul_(projected)).mul_(r))
        return dx, dgate, dweight.to(weight.dtype), None
