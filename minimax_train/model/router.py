"""The router of a mixture of experts: fp32, top k (arXiv 2501.08313 section 2; released code).

p = softmax(W_r x) over all experts, in fp32; the top k are kept and renormalised to sum to 1
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimax_train.model.config import ModelConfig
from minimax_train.model.parts import Parts


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What one layer's router did with the tokens of one packed row, of which this rank has a part."""

    auxiliary_loss: Tensor
    """Scalar fp32, differentiable: this rank's share. The shares of all ranks of the row add up to the row's, which is 1 when balanced."""
    tokens_per_expert: Tensor
    """`[experts]` int64: (token, choice) pairs of the whole row sent to each expert; the same on all ranks of the row."""
    here: Tensor
    """`[experts]` int64: those of this rank's tokens."""


class Router(nn.Module):
    """Scores experts in fp32; its weight stays fp32 whatever the model's dtype, as released."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.experts_per_token, self.sum_over_row = config.experts_per_token, parts.sum_over_row
        self.weight = parts.replicated(config.num_experts, config.hidden_size, dtype=torch.float32)

    def forward(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """`[T, hidden]` -> weights `[T, k]` fp32 summing to 1, experts `[T, k]` int64, and the row's routing.

        One small sum over the ranks of the row: the auxiliary loss is the whole row's, whatever the layout.
        """
        probability_TE = F.linear(x_TC.to(self.weight.dtype), self.weight).softmax(dim=-1)
        chosen, expert = probability_TE.topk(self.experts_per_token, dim=-1)
        experts = self.weight.shape[0]
        here = torch.bincount(expert.flatten(), minlength=experts)
        counts = self.sum_over_row(here)
        choices = counts.sum()
        # experts * sum_e f_e * m_e, f the fraction of choices and m the mean probability (Switch, arXiv 2101.03961 eq. 4)
        mean = probability_TE.sum(dim=0) * (self.experts_per_token / choices)
        routing = Routing(auxiliary_loss=experts * (counts / choices * mean).sum(), tokens_per_expert=counts, here=here)
        return chosen / chosen.sum(dim=-1, keepdim=True), expert, routing
