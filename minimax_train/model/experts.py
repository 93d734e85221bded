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
    """What one layer's router did with the tokens of one packed row."""

    auxiliary_loss: Tensor
    """Scalar fp32, differentiable; 1 when balanced."""
    tokens_per_expert: Tensor
    """`[experts]` int64: (token, choice) pairs sent to each expert."""


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
        self.experts_per_token = config.experts_per_token
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32, device=parts.device))

    def forward(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """`[T, hidden]` -> weights `[T, k]` fp32 summing to 1, experts `[T, k]` int64, and the row's routing."""
        probability_TE = F.linear(x_TC.to(self.weight.dtype), self.weight).softmax(dim=-1)
        chosen, expert = probability_TE.topk(self.experts_per_token, dim=-1)
        experts = self.weight.shape[0]
        counts = torch.bincount(expert.flatten(), minlength=experts)
        # experts * sum_e f_e * m_e, f the fraction of choices and m the mean probability (Switch, arXiv 2101.03961 eq. 4)
        auxiliary = experts * (counts / expert.numel() * probability_TE.mean(dim=0)).sum()
        return chosen / chosen.sum(dim=-1, keepdim=True), expert, Routing(auxiliary_loss=auxiliary, tokens_per_expert=counts)


class Experts(nn.Module):
    """Router and experts of one layer. Weights are stacked over experts: gate_up `[E, 2f, hidden]` (gate first), down `[E, hidden, f]`."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.router = Router(config, parts)
        count, hidden, ffn = config.num_experts, config.hidden_size, config.expert_ffn_size
        self.gate_up = nn.Parameter(torch.empty(count, 2 * ffn, hidden, dtype=parts.dtype, device=parts.device))
        self.down = nn.Parameter(torch.empty(count, hidden, ffn, dtype=parts.dtype, device=parts.device))

    def forward(self, x_TC: Tensor) -> tuple[Tensor, Routing]:
        """`[T, hidden]` -> `[T, hidden]`, every choice computed (dropless)."""
        weight_TK, expert_TK, routing = self.router(x_TC)
        choices = expert_TK.shape[1]
        order = expert_TK.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = _Permute.apply(x_TC.repeat_interleave(choices, dim=0), order, inverse)
        rows = _Permute.apply(self.compute(rows, routing.tokens_per_expert.tolist()), inverse, order)
        y_TC = (rows.view(*expert_TK.shape, -1) * weight_TK[..., None].to(rows.dtype)).sum(dim=1)
        return y_TC, routing

    def compute(self, rows: Tensor, counts: list[int]) -> Tensor:
        """SwiGLU of rows sorted by expert, `counts` of them each; an expert without rows still gets a true zero gradient."""
        outputs = []
        for x, gate_up, down in zip(rows.split(counts), self.gate_up.unbind(), self.down.unbind(), strict=True):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(outputs)
