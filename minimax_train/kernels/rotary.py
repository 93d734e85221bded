"""Rotary embedding of the first channels of each head: channel i turns with channel i + half (arXiv 2104.09864, half-split pairing)."""

import importlib.util

import torch
from torch import Tensor


def define(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition: products in fp32 whatever x's dtype (fp64 for fp64); channels beyond 2 half pass through."""
    half, wide = cos.shape[-1], torch.promote_types(x_THD.dtype, torch.float32)
    first, second, rest = x_THD[..., :half].to(wide), x_THD[..., half : 2 * half].to(wide), x_THD[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THD.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[T, H, D]`, cos and sin `[T, 1, half]` fp32 -> `[T, H, D]` of x's dtype, by the best form for x's device."""
    if x_THD.device.type == "cuda" and x_THD.dtype != torch.float64 and importlib.util.find_spec("triton"):
        from minimax_train.kernels.rotary_triton import Rotary

        turned: Tensor = Rotary.apply(x_THD, cos, sin)
        return turned
    return define(x_THD, cos, sin)
