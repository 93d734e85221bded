"""Head and cross-entropy in one, in chunks of tokens: full logits of a long row never exist.

Logits of 1M tokens over 200,064 entries would take 800 GB in fp32; a chunk of 1,024 takes 0.8 GB. Backward recomputes each
chunk's logits, and writes one gradient of the head, so that a reduction hook on it fires once.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

CHUNK = 1024
IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, fp32: bool) -> Tensor:
        ctx.fp32 = fp32  # type: ignore[attr-defined]
        w = weight_VC.float() if fp32 else weight_VC
        rows = _rows(w)
        results = [rows.forward(x.to(w.dtype) @ w.T, labels) for x, labels in zip(x_TC.split(CHUNK), labels_T.split(CHUNK), strict=True)]
        losses, normalisers = (torch.cat(parts) for parts in zip(*results, strict=True))
        ctx.save_for_backward(x_TC, weight_VC, labels_T, normalisers)
        return losses

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_TC, weight_VC, labels_T, normalisers = ctx.saved_tensors  # type: ignore[attr-defined]
        w = weight_VC.float() if ctx.fp32 else weight_VC  # type: ignore[attr-defined]
        grad_x = torch.empty_like(x_TC)
        grad_w = torch.zeros_like(w, dtype=_statistics(w.dtype))
        rows = _rows(w)
        for start in range(0, len(x_TC), CHUNK):
            chunk = slice(start, start + CHUNK)
            x, labels = x_TC[chunk].to(w.dtype), labels_T[chunk]
            d_logits = rows.backward(x @ w.T, labels, normalisers[chunk], grads[0][chunk])
            grad_x[chunk] = (d_logits @ w).to(x_TC.dtype)
            grad_w += d_logits.T @ x
        return grad_x, grad_w.to(weight_VC.dtype), None, None


def _statistics(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics and the accumulated weight gradient: fp32, or fp64 for fp64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """What is done with a chunk of logits `[n, V]`: losses and log sum exp; the gradient, which may take their place."""

    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _rows(w: Tensor) -> _Rows:
    if w.device.type == "cuda" and w.dtype != torch.float64 and importlib.util.find_spec("triton"):
        from minimax_train.kernels.cross_entropy_triton import cross_entropy, cross_entropy_gradient_

        return _Rows(forward=cross_entropy, backward=cross_entropy_gradient_)
    return _Rows(forward=define, backward=define_gradient)


def define(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: (-log softmax(logits)[label], 0 for label -100; log sum exp(logits)), each `[T]`."""
    wide = logits_TV.to(_statistics(logits_TV.dtype))
    normaliser, ignored = wide.logsumexp(-1), labels_T == IGNORED
    chosen = wide.gather(1, labels_T.masked_fill(ignored, 0)[:, None])[:, 0]
    return torch.where(ignored, 0.0, normaliser - chosen), normaliser


def define_gradient(logits_TV: Tensor, labels_T: Tensor, normaliser_T: Tensor, scale_T: Tensor) -> Tensor:
    """The definition: scale (softmax(logits) - onehot(label)), 0 for label -100, `[T, V]` in the logits' dtype."""
    p, ignored = torch.exp(logits_TV.to(normaliser_T.dtype) - normaliser_T[:, None]), labels_T == IGNORED
    p[torch.arange(len(labels_T), device=labels_T.device), labels_T.masked_fill(ignored, 0)] -= 1.0
    return (p * torch.where(ignored, 0.0, scale_T)[:, None]).to(logits_TV.dtype)


def linear_cross_entropy(x_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, *, fp32: bool = False) -> Tensor:
    """-log softmax(x W^T)[label] for every token.

    x `[T, C]`, weight `[V, C]` of one dtype, labels `[T]` int64 in [0, V) or -100 (loss 0, no gradient). Returns `[T]` fp32 nats
    (fp64 for fp64 inputs). `fp32` multiplies in fp32 whatever the inputs' dtype (MiniMax-M1's head, arXiv 2506.13585 section 3.2).
    """
    loss: Tensor = _LinearCrossEntropy.apply(x_TC, weight_VC, labels_T, fp32)
    return loss
