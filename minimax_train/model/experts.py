"""Mixture of SwiGLU experts, in every layer (arXiv 2501.08313 section 2; released code).

y = sum_k p_k * W_2( SiLU(W_1 x) * (W_3 x) ), k and p_k by the router
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from minimax_train.kernels.grouped_linear import rows_multiple
from minimax_train.model.config import ModelConfig
from minimax_train.model.parts import Parts
from minimax_train.model.recompute import FirstRun
from minimax_train.model.router import Router, Routing
from minimax_train.model.swiglu import SwiGLU
from parallel.experts import Planning, experts_over_ranks, plan_journey


class _Spread(torch.autograd.Function):
    """rows[i] = x[order[i] // choices]; its backward gathers by the inverse and adds a token's choices: deterministic, without atomics."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens = len(x)  # type: ignore[attr-defined]
        return x.index_select(0, order // (len(order) // len(x)))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].index_select(0, inverse).unflatten(0, (ctx.tokens, -1)).sum(1), None, None  # type: ignore[attr-defined]


class _Permute(torch.autograd.Function):
    """y[i] = x[order[i]] for a permutation: its backward is the inverse gather."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].index_select(0, inverse), None, None


class Experts(nn.Module):
    """Router and experts of one layer. Weights are stacked over experts: gate_up `[E, 2f, hidden]` (gate first), down `[E, hidden, f]`.

    Of these a rank holds its experts and its slice of their width f, gate's and up's alike.
    """

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.router = Router(config, parts)
        count, hidden, ffn = config.num_experts, config.hidden_size, config.expert_ffn_size
        self.count, self.groups = count, parts.groups
        self.backend = parts.backends.experts
        self.gate_up = parts.experts(count, 2 * ffn, hidden, axis=1, matrices=2, dtype=parts.dtype)
        self.down = parts.experts(count, hidden, ffn, axis=2, dtype=parts.dtype)

    def forward(
        self, x_TC: Tensor, places_S: Tensor | None = None, first: FirstRun | None = None, *, again: bool = False
    ) -> tuple[Tensor, Routing]:
        """`[T, hidden]` -> `[T, hidden]`; choices that the router dropped are not computed and add nothing. `places_S`: see the router.

        `first`: what the first run of this layer left, or is to leave, to its second. `again`: see SwiGLU. All ranks of the block call it
        together.
        """
        first = first or FirstRun()
        plannings: list[Planning] = []

        def chosen(expert_TK: Tensor) -> None:
            """Counts travel while the router works out what it reports."""
            if first.journey is None:
                groups, multiple = self.groups.layout.token_groups, rows_multiple(self.backend)
                plannings.append(plan_journey(expert_TK, self.count, self.groups, token_groups=groups, multiple=multiple))

        weight_TK, expert_TK, routing = self.router(x_TC, places_S, chosen)
        if first.journey is None:
            first.journey = plannings[0].finish()
        journey = first.journey
        rows = _Spread.apply(x_TC, journey.order, journey.inverse)[: journey.rows]
        rows = experts_over_ranks(rows, (self.gate_up, self.down), SwiGLU(backend=self.backend, again=again), journey, self.groups)
        if journey.rows < len(journey.order):
            rows = F.pad(rows, (0, 0, 0, len(journey.order) - journey.rows))
        rows = _Permute.apply(rows, journey.inverse, journey.order)
        y_TC = (rows.view(*expert_TK.shape, -1) * weight_TK[..., None].to(rows.dtype)).sum(dim=1)
        return y_TC, routing
