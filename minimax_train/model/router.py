"""The router of a mixture of experts: fp32, top k (arXiv 2501.08313 section 2; released code).

p = softmax(W_r x) over all experts, in fp32; the top k are kept and renormalised to sum to 1
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimax_train.model.config import ModelConfig
from minimax_train.model.parts import Parts
from parallel.collectives import Channel, all_sum


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What one layer's router did with this rank's tokens, and what it knows of the unit they are counted in (a row, unless said)."""

    auxiliary_loss: Tensor
    """Scalar fp32, differentiable: this rank's share. All ranks' shares add up to the unit's auxiliary loss, which is 1 when balanced."""
    tokens_per_expert: Tensor
    """`[experts]` int64: (token, choice) pairs of the whole unit sent to each expert, before any is dropped; the same on all its ranks."""
    here: Tensor
    """`[experts]` int64: those of this rank's tokens that are kept: what each expert computes for them."""
    sums: Tensor
    """`[experts + 2]` fp64, of this rank's tokens alone, so that they add up over any ranks: choices of each expert before any is dropped,
    choices kept, and the tokens' entropies of p in nats."""


class Router(nn.Module):
    """Scores experts in fp32; its weight stays fp32 whatever the model's dtype, as released."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        groups, self.options = parts.groups, parts.router
        self.experts_per_token = config.experts_per_token
        self.tensor, self.row = groups.tensor, Channel(groups.tensor_context, late=groups.context.late)
        self.unit = self.row if self.options.unit == "row" else Channel(groups.tensor_data_context, late=groups.context.late)
        self.weight = parts.replicated(config.num_experts, config.hidden_size, dtype=torch.float32)

    def forward(
        self, x_TC: Tensor, places_S: Tensor | None = None, chosen: Callable[[Tensor], None] = lambda expert_TK: None
    ) -> tuple[Tensor, Tensor, Routing]:
        """`[T, hidden]` -> weights `[T, k]` fp32, experts `[T, k]` int64, and the routing.

        A token's weights sum to 1 before choices are dropped. A dropped one has weight 0 and, as its expert, the number of experts: sorted
        by expert, the first `routing.here.sum()` choices are those to compute. `places_S`: where in the row the tokens of the tensor-
        parallel group stand (None: in order); it decides between equal probabilities. One small sum over the unit's ranks, whose balancing
        loss is the same whatever the layout; with a capacity also a gather of 4 (2k + 1) bytes a token of the unit. `chosen` is told the
        experts as soon as they are known, before all that the routing alone needs.
        """
        probability_TE = F.linear(x_TC.to(self.weight.dtype), self.weight).softmax(dim=-1)
        chosen_TK, expert_TK = probability_TE.topk(self.experts_per_token, dim=-1)
        weight_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True)
        experts, unit = len(self.weight), self.unit if self.training else self.row
        wanted = kept = _choices(expert_TK, experts)
        limit = self.options.limit(expert_TK.numel() * unit.size, experts) if self.training else None
        if limit is not None:
            kept_TK = self._kept(chosen_TK.detach(), expert_TK, places_S, limit)
            weight_TK, expert_TK = weight_TK.masked_fill(~kept_TK, 0.0), expert_TK.masked_fill(~kept_TK, experts)
            kept = _choices(expert_TK, experts + 1)[:experts]
        chosen(expert_TK)
        counts = all_sum(wanted, unit.group) if unit.size > 1 else wanted
        choices = counts.sum()
        # experts * sum_e f_e * m_e, f the fraction of choices and m the mean probability (Switch, arXiv 2101.03961 eq. 4)
        mean = probability_TE.sum(dim=0) * (self.experts_per_token / choices)
        entropy = torch.special.entr(probability_TE.detach()).sum(dtype=torch.float64)
        return (
            weight_TK,
            expert_TK,
            Routing(
                auxiliary_loss=experts * (counts / choices * mean).sum(),
                tokens_per_expert=counts,
                here=kept,
                sums=torch.cat([wanted, torch.stack([kept.sum(), entropy])]),
            ),
        )

    def _kept(self, chosen_TK: Tensor, expert_TK: Tensor, places_S: Tensor | None, limit: int) -> Tensor:
        """Which of this rank's choices the experts take, `[T, k]` bool: every rank works out the whole unit's answer."""
        tokens = len(chosen_TK)
        if places_S is None:
            places_S = torch.arange(tokens * self.tensor.size(), device=chosen_TK.device)
        row = self.unit.rank // self.row.size  # the ranks of a row are neighbours in the unit
        place_T = places_S.tensor_split(self.tensor.size())[self.tensor.rank()] + row * tokens * self.row.size
        sent = torch.cat([place_T[:, None].int(), expert_TK.int(), chosen_TK.view(torch.int32)], dim=1)  # a float's bits travel unchanged
        place, expert, probability = (
            self.unit.begin_all_gather(sent, "capacity").finish().flatten(0, 1).split([1, *[expert_TK.shape[1]] * 2], dim=1)
        )
        order = place.flatten().argsort()  # tokens in the order of the rows, whoever holds them
        kept = most_probable(probability[order].contiguous().view(torch.float32), expert[order], limit)
        return kept[place_T]


def most_probable(probability_NK: Tensor, expert_NK: Tensor, limit: int) -> Tensor:
    """`[N, k]` bool: of each expert's choices the `limit` most probable; of equal ones those of earlier tokens."""
    probability, expert = probability_NK.flatten(), expert_NK.flatten()
    order = probability.argsort(descending=True, stable=True)
    order = order[expert[order].argsort(stable=True)]  # expert by expert, most probable first
    queues = expert[order]
    in_queue = torch.arange(len(queues), device=queues.device) - torch.searchsorted(queues, queues)
    return torch.empty_like(expert, dtype=torch.bool).scatter_(0, order, in_queue < limit).view(expert_NK.shape)


def _choices(expert_TK: Tensor, experts: int) -> Tensor:
    """How many choices fell on each of `experts`, int64; torch's bincount would make a GPU wait for the largest."""
    chosen = expert_TK.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=chosen.device).scatter_add_(0, chosen, torch.ones_like(chosen))
