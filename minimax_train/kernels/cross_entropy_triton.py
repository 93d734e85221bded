# mypy: disallow-untyped-defs=False
"""Rows of a chunk of logits on a GPU: the loss in one read; the gradient in place, one read and one write. Statistics are fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
LOWEST = tl.constexpr(-3.4e38)  # fp32; not -inf, of which differences are no numbers
IGNORED = tl.constexpr(-100)
ELSEWHERE = tl.constexpr(-200)  # cross_entropy.ELSEWHERE


@triton.jit
def losses(logits, labels, loss, normaliser, size, stride, BLOCK: tl.constexpr):
    """loss = log sum exp - logit of the label, 0 for an ignored one or one elsewhere, NaN for one outside the vocabulary; normaliser = log
    sum exp, by a running maximum."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * stride
    i = tl.arange(0, BLOCK)
    most = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, size, BLOCK):
        x = tl.load(logits + start + i, mask=start + i < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher))
        most = higher
    log_total = tl.log(total)
    chosen = tl.load(logits + label, mask=(label >= 0) & (label < size), other=float("nan")).to(tl.float32)
    tl.store(normaliser + row, most + log_total)
    tl.store(loss + row, tl.where((label == IGNORED) | (label == ELSEWHERE), 0.0, most - chosen + log_total))


@triton.jit
def to_gradients(logits, labels, normaliser, scales, size, stride, BLOCK: tl.constexpr):
    """logits <- scale (softmax - onehot(label)), 0 for an ignored label, no one for one elsewhere; a program a row and block."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label, scale = tl.load(labels + row), tl.load(scales + row).to(tl.float32)
    logits += row * stride
    x = tl.load(logits + i, mask=i < size, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(normaliser + row)) - tl.where(i == label, 1.0, 0.0)
    tl.store(logits + i, tl.where(label == IGNORED, 0.0, p * scale).to(logits.dtype.element_ty), mask=i < size)


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, log sum exp), each `[T]` fp32. Logits bf16, fp16 or fp32 with contiguous rows; labels int64, -100 ignored, -200 elsewhere."""
    (rows, size), labels_T = logits_TV.shape, labels_T.contiguous()
    loss, normaliser = (logits_TV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(logits_TV):
        losses[(rows,)](logits_TV, labels_T, loss, normaliser, size, logits_TV.stride(0), BLOCK=BLOCK, num_warps=WARPS)
    return loss, normaliser


def cross_entropy_gradient_(logits_TV: Tensor, labels_T: Tensor, normaliser_T: Tensor, scale_T: Tensor) -> Tensor:
    """Turns logits into d loss / d logits times scale `[T]`, in place, and returns them."""
    (rows, size), labels_T = logits_TV.shape, labels_T.contiguous()
    scale_T = scale_T.contiguous()  # the gradient of a sum is one number, expanded
    grid = (rows, triton.cdiv(size, BLOCK))
    with torch.cuda.device_of(logits_TV):
        to_gradients[grid](logits_TV, labels_T, normaliser_T, scale_T, size, logits_TV.stride(0), BLOCK=BLOCK, num_warps=WARPS)
    return logits_TV
