"""Rotary position embedding on the first `rotary_dim` channels of each head (arXiv 2104.09864).

Half-split pairing as in the released weights: channel i turns with channel i + rotary_dim/2. Angles, cosines and the rotation
itself are fp32 whatever the activations' dtype.
"""

import torch
from torch import Tensor

from minimax_train.kernels.rotary import rotate

__all__ = ["rotate", "rotation"]


def rotation(positions_T: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each `[T, 1, rotary_dim/2]` fp32, for integer positions `[T]`: angle = position * base^(-2i/rotary_dim)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_T.device) / rotary_dim
    angle = positions_T.float()[:, None] * (1.0 / base**exponent)[None, :]
    return angle.cos()[:, None, :], angle.sin()[:, None, :]
