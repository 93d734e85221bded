"""RMSNorm with fp32 statistics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimax_train.kernels.gated_norm import gated_rms_norm


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis; statistics in fp32 whatever the dtype (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], same dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) * sigmoid(gate). A module of its own: DDP waits for a weight's gather when its module is called."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """`[T, size]` twice -> `[T, size]`."""
        return gated_rms_norm(x, gate, self.weight, self.eps)
