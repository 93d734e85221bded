"""Rotary position embedding on the first `rotary_dim` channels of each head (arXiv 2104.09864).

Half-split pairing as in the released weights: channel i turns with channel i + rotary_dim/2. Angles, cosines and the rotation
itself are fp32 whatever the activations' dtype.
"""

import torch
from torch import Tensor


def rotation(positions_T: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each `[T, 1, rotary_dim/2]` fp32, for integer positions `[T]`: angle = position * base^(-2i/rotary_dim)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_T.device) / rotary_dim
    angle = positions_T.float()[:, None] * (1.0 / base**exponent)[None, :]
    return angle.cos()[:, None, :], angle.sin()[:, None, :]


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] channels of each head; `[T, H, D]` -> `[T, H, D]`, same dtype."""
    half = cos.shape[-1]
    first, second, rest = x_THD[..., :half].float(), x_THD[..., half : 2 * half].float(), x_THD[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THD.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
