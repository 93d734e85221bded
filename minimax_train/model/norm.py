"""RMSNorm with fp32 statistics."""

import torch.nn.functional as F
from torch import Tensor, nn

from minimax_train.kernels.gated_norm import gated_rms_norm
from minimax_train.model.parts import Parts


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis; statistics in fp32 whatever the dtype (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, parts: Parts) -> None:
        super().__init__()
        self.weight = parts.replicated(size, dtype=parts.dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], same dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm(x) * sigmoid(gate) over the channels of all heads, of which this rank has its heads'.

    A module of its own: DDP waits for a weight's gather when its module is called.
    """

    def __init__(self, size: int, eps: float, parts: Parts) -> None:
        super().__init__()
        self.weight = parts.sharded(size, dtype=parts.dtype)
        self.size, self.eps, self.total = size, eps, parts.total

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """`[S, size / tensor]` twice -> `[S, size / tensor]`."""
        return gated_rms_norm(x, gate, self.weight, self.eps, total=self.total, channels=self.size)
