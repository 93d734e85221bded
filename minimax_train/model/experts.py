"""Mixture of SwiGLU experts, in every layer (arXiv 2501.08313 section 2; released code).

y = sum_k p_k * W_2( SiLU(W_1 x) * (W_3 x) ), k and p_k by the router
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from minimax_train.model.config import ModelConfig
from minimax_train.model.parts import Parts
from minimax_train.model.router import Router, Routing


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


class Experts(nn.Module):
    """Router and experts of one layer. Weights are stacked over experts: gate_up `[E, 2f, hidden]` (gate first), down `[E, hidden, f]`."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.router = Router(config, parts)
        count, hidden, ffn = config.num_experts, config.hidden_size, config.expert_ffn_size
        self.gate_up = parts.experts(count, 2 * ffn, hidden, dtype=parts.dtype)
        self.down = parts.experts(count, hidden, ffn, dtype=parts.dtype)

    def forward(self, x_TC: Tensor, places_S: Tensor | None = None) -> tuple[Tensor, Routing]:
        """`[T, hidden]` -> `[T, hidden]`; choices that the router dropped are not computed and add nothing. `places_S`: see the router."""
        weight_TK, expert_TK, routing = self.router(x_TC, places_S)
        choices = expert_TK.shape[1]
        order = expert_TK.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = _Permute.apply(x_TC.repeat_interleave(choices, dim=0), order, inverse)
        counts: list[int] = routing.here.tolist()
        dropped = len(rows) - sum(counts)  # last in order
        rows = self.compute(rows[: sum(counts)], counts)
        rows = _Permute.apply(F.pad(rows, (0, 0, 0, dropped)) if dropped else rows, inverse, order)
        y_TC = (rows.view(*expert_TK.shape, -1) * weight_TK[..., None].to(rows.dtype)).sum(dim=1)
        return y_TC, routing

    def compute(self, rows: Tensor, counts: list[int]) -> Tensor:
        """SwiGLU of rows sorted by expert, `counts` of them each; an expert without rows still gets a true zero gradient."""
        outputs = []
        for x, gate_up, down in zip(rows.split(counts), self.gate_up.unbind(), self.down.unbind(), strict=True):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(outputs)
