"""What the routers of all layers did in one step."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """Figures of every layer, first layer first, over all tokens of a step."""

    share: list[list[float]]
    """Layers x experts: the share of choices that each expert got, before any was dropped."""
    entropy: list[float]
    """Mean over tokens of the entropy of the router's probabilities, nats: log(experts) where it knows nothing, 0 where it is certain."""
    dropped: list[float]
    """The fraction of choices that no expert had room for."""

    @classmethod
    def of(cls, sums: Tensor, choices: int) -> "RoutingReport":
        """From the sums `[layers, experts + 2]` fp64 of `model.router.Routing`, over all ranks and rows; `choices` experts a token."""
        wanted, kept, entropy = sums.split([sums.shape[1] - 2, 1, 1], dim=1)
        total = wanted.sum(dim=1, keepdim=True)
        return cls(
            share=(wanted / total).tolist(),
            entropy=(entropy * choices / total).flatten().tolist(),
            dropped=(1 - kept / total).flatten().tolist(),
        )

    @property
    def largest_load(self) -> list[float]:
        """The busiest expert's load over the mean expert's; 1 at balance."""
        return [max(layer) * len(layer) for layer in self.share]

    @property
    def load_entropy(self) -> list[float]:
        """Entropy of the experts' shares, nats: log(experts) at balance."""
        return [-sum(share * math.log(share) for share in layer if share > 0) for layer in self.share]
