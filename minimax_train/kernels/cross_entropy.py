"""Head and cross-entropy in one, in chunks of tokens: full logits of a long row never exist.

Logits of 1M tokens over 200,064 entries would take 800 GB in fp32; a chunk of 1,024 takes 0.8 GB. Backward recomputes each
chunk's logits, and writes one gradient of the head, so that a reduction hook on it fires once.

Where tensor parallelism cuts the vocabulary, a rank has the logits of its part and n_p, their log sum exp; one gather of n_p and of
the losses against n_p gives all ranks the whole's: n = log sum_p exp(n_p), and loss = loss_p + (n - n_p) of the part p with the label.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

CHUNK = 1024
IGNORED = -100
ELSEWHERE = -200
"""A label that another part of the vocabulary has: loss 0 here; its row's gradient is that of a row without a label, scale * softmax."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of a vocabulary, cut evenly over ranks, is here; all of it by default."""

    rank: int = 0
    ranks: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x[None]
    """`[...]` of every rank, one shape -> `[ranks, ...]`, in rank order."""

    def local(self, labels_T: Tensor, size: int) -> Tensor:
        """The labels as rows of this part of `size`; ELSEWHERE, -100 as it is, and `size` where no part has the label."""
        here = labels_T - self.rank * size
        elsewhere = (here < 0) | (here >= size)
        known = (labels_T >= 0) & (labels_T < self.ranks * size)
        outside = torch.where(labels_T == IGNORED, IGNORED, torch.where(known, ELSEWHERE, size))
        return torch.where(elsewhere | ~known, outside, here)

    def combine(self, losses_T: Tensor, normaliser_T: Tensor, labels_T: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Losses and log sum exp of the part `[T]` -> of the whole."""
        losses_PT, normaliser_PT = self.gather(torch.stack([losses_T, normaliser_T])).unbind(1)
        owner = (labels_T // size).clamp(0, self.ranks - 1)[None]
        rest = (normaliser_PT - normaliser_PT.gather(0, owner)).logsumexp(0)  # n - n_p without the difference of two large numbers
        losses = torch.where(labels_T == IGNORED, 0.0, losses_PT.gather(0, owner)[0] + rest)
        return losses, normaliser_PT.logsumexp(0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_TC: Tensor, weight_VC: Tensor, whole_labels_T: Tensor, fp32: bool, part: Part) -> Tensor:
        ctx.fp32 = fp32  # type: ignore[attr-defined]
        w = weight_VC.float() if fp32 else weight_VC
        rows, labels_T = _rows(w), part.local(whole_labels_T, len(w))
        results = [rows.forward(x.to(w.dtype) @ w.T, labels) for x, labels in zip(x_TC.split(CHUNK), labels_T.split(CHUNK), strict=True)]
        losses, normalisers = (torch.cat(chunks) for chunks in zip(*results, strict=True))
        losses, normalisers = part.combine(losses, normalisers, whole_labels_T, len(w))
        ctx.save_for_backward(x_TC, weight_VC, labels_T, normalisers)
        return losses

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
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
        return grad_x, grad_w.to(weight_VC.dtype), None, None, None


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
    """The definition: (-log softmax(logits)[label], 0 for labels -100 and -200; log sum exp(logits)), each `[T]`."""
    wide = logits_TV.to(_statistics(logits_TV.dtype))
    normaliser, absent = wide.logsumexp(-1), (labels_T == IGNORED) | (labels_T == ELSEWHERE)
    chosen = wide.gather(1, labels_T.masked_fill(absent, 0)[:, None])[:, 0]
    return torch.where(absent, 0.0, normaliser - chosen), normaliser


def define_gradient(logits_TV: Tensor, labels_T: Tensor, normaliser_T: Tensor, scale_T: Tensor) -> Tensor:
    """The definition: scale (softmax(logits) - onehot(label)), 0 for label -100, no one for -200, `[T, V]` in the logits' dtype."""
    p, ignored = torch.exp(logits_TV.to(normaliser_T.dtype) - normaliser_T[:, None]), labels_T == IGNORED
    absent = ignored | (labels_T == ELSEWHERE)
    p[torch.arange(len(labels_T), device=labels_T.device), labels_T.masked_fill(absent, 0)] -= (~absent).to(p.dtype)
    return (p * torch.where(ignored, 0.0, scale_T)[:, None]).to(logits_TV.dtype)


def linear_cross_entropy(x_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, *, fp32: bool = False, part: Part | None = None) -> Tensor:
    """-log softmax(x W^T)[label] for every token.

    x `[T, C]`, weight `[V, C]` of one dtype, labels `[T]` int64 in [0, V) or -100 (loss 0, no gradient). Returns `[T]` fp32 nats
    (fp64 for fp64 inputs). `fp32` multiplies in fp32 whatever the inputs' dtype (MiniMax-M1's head, arXiv 2506.13585 section 3.2).

    With `part`, weight is this rank's rows `[V / ranks, C]` of the head, x and labels are the same on all of its ranks, which call it
    together; all get the same losses. A rank's gradient of x comes from its rows: the whole's is the sum over the ranks.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x_TC, weight_VC, labels_T, fp32, Part() if part is None else part)
    return loss
