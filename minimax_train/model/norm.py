"""RMSNorm with fp32 statistics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis; statistics in fp32 whatever the dtype (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], same dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
