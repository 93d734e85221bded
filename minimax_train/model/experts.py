"""Mixture of experts, in every layer: fp32 top-2 router and SwiGLU experts (arXiv 2501.08313 section 2; released code).

p = softmax(W_r x) over all experts, in fp32; the top k are kept and renormalised to sum to 1
y = sum_k p_k * W_2( SiLU(W_1 x) * (W_3 x) )
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

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


class _Permute(torch.autograd.Function):
    """y[i] = x[order[i]] for a permutation: its backward is the inverse gather, deterministic and without atomics."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].index_select(0, inverse), None, None


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


class Experts(nn.Module):
    """Router and experts of one layer. Weights are stacked over experts: gate_up `[E, 2f, hidden]` (gate first), down `[E, hidden, f]`."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.router = Router(config, parts)
        count, hidden, ffn = config.num_experts, config.hidden_size, config.expert_ffn_size
        self.gate_up = parts.experts(count, 2 * ffn, hidden, dtype=parts.dtype)
        self.down = parts.experts(count, hidden, ffn, dtype=parts.dtype)

    def forward(self, x_TC: Tensor) -> tuple[Tensor, Routing]:
        """`[T, hidden]` -> `[T, hidden]`, every choice computed (dropless)."""
        weight_TK, expert_TK, routing = self.router(x_TC)
        choices = expert_TK.shape[1]
        order = expert_TK.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = _Permute.apply(x_TC.repeat_interleave(choices, dim=0), order, inverse)
        rows = _Permute.apply(self.compute(rows, routing.here.tolist()), inverse, order)
        y_TC = (rows.view(*expert_TK.shape, -1) * weight_TK[..., None].to(rows.dtype)).sum(dim=1)
        return y_TC, routing

    def compute(self, rows: Tensor, counts: list[int]) -> Tensor:
        """SwiGLU of rows sorted by expert, `counts` of them each; an expert without rows still gets a true zero gradient."""
        outputs = []
        for x, gate_up, down in zip(rows.split(counts), self.gate_up.unbind(), self.down.unbind(), strict=True):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(outputs)
