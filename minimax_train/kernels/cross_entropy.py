"""Head and cross-entropy in one, in chunks of tokens: full logits of a long row never exist.

Logits of 1M tokens over 200,064 entries would take 800 GB in fp32; a chunk of 1,024 takes 0.8 GB. Backward recomputes each
chunk's logits, and writes one gradient of the head, so that a reduction hook on it fires once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

CHUNK = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, fp32: bool) -> Tensor:
        ctx.save_for_backward(x_TC, weight_VC, labels_T)
        ctx.fp32 = fp32  # type: ignore[attr-defined]
        w = weight_VC.float() if fp32 else weight_VC
        losses = [
            F.cross_entropy((x.to(w.dtype) @ w.T).to(_statistics(w)), labels, reduction="none")
            for x, labels in zip(x_TC.split(CHUNK), labels_T.split(CHUNK), strict=True)
        ]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_TC, weight_VC, labels_T = ctx.saved_tensors  # type: ignore[attr-defined]
        w = weight_VC.float() if ctx.fp32 else weight_VC  # type: ignore[attr-defined]
        grad_x = torch.empty_like(x_TC)
        grad_w = torch.zeros_like(w, dtype=_statistics(w))
        for start in range(0, len(x_TC), CHUNK):
            chunk = slice(start, start + CHUNK)
            x, labels = x_TC[chunk].to(w.dtype), labels_T[chunk]
            scale = torch.where(labels < 0, 0.0, grads[0][chunk])  # an ignored token contributes nothing
            p = (x @ w.T).to(grad_w.dtype).softmax(dim=-1)
            rows = torch.arange(len(labels), device=labels.device)
            p[rows, labels.clamp(min=0)] -= 1.0  # d loss / d logits = p - onehot(label)
            d_logits = (p * scale[:, None]).to(w.dtype)
            grad_x[chunk] = (d_logits @ w).to(x_TC.dtype)
            grad_w += d_logits.T @ x
        return grad_x, grad_w.to(weight_VC.dtype), None, None


def _statistics(w: Tensor) -> torch.dtype:
    """Softmax statistics and the accumulated weight gradient: fp32, or fp64 for fp64 weights."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def linear_cross_entropy(x_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, *, fp32: bool = False) -> Tensor:
    """-log softmax(x W^T)[label] for every token.

    x `[T, C]`, weight `[V, C]` of one dtype, labels `[T]` int64 in [0, V) or -100 (loss 0, no gradient). Returns `[T]` fp32 nats
    (fp64 for fp64 inputs). `fp32` multiplies in fp32 whatever the inputs' dtype (MiniMax-M1's head, arXiv 2506.13585 section 3.2).
    """
    loss: Tensor = _LinearCrossEntropy.apply(x_TC, weight_VC, labels_T, fp32)
    return loss
