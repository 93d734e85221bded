"""SwiGLU experts as parallel.experts wants them: y = W_2( SiLU(W_1 x) * (W_3 x) ), forward and backward in steps.

Kept for backward are the rows x and [W_1 x; W_3 x], (hidden + 2 f) numbers a row; SiLU and products are computed again. With all that
autograd would keep it were hidden + 5 f. With `again` it is the rows alone, hidden numbers, and [W_1 x; W_3 x] is computed again too: two
of the three products of a forward pass. (f: this rank's share of the expert's width.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_train.kernels.grouped_linear import (
    Bounds,
    grouped_linear,
    grouped_linear_input_gradient,
    grouped_linear_weight_gradient,
)

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """parallel.experts.Compute with weights (gate_up `[E, 2f, hidden]`, gate first, down `[E, hidden, f]`)."""

    backend: str
    """Of kernels.grouped_linear."""
    again: bool = False
    """Whether gate and up are computed again in the backward pass."""

    def outputs(self, rows: Tensor, counts: Sequence[int], weights: Tensors) -> tuple[Tensor, Tensors]:
        gate_up, down = weights
        bounds = Bounds(counts, rows.device, self.backend)
        hidden = grouped_linear(rows, gate_up, bounds)
        gate, up = hidden.chunk(2, dim=-1)
        return grouped_linear(F.silu(gate).mul_(up), down, bounds), (rows,) if self.again else (rows, hidden)

    def input_gradient(self, gradient: Tensor, counts: Sequence[int], weights: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        (gate_up, down), rows = weights, kept[0]
        bounds = Bounds(counts, rows.device, self.backend)
        hidden = grouped_linear(rows, gate_up, bounds) if self.again else kept[1]
        gate, up = hidden.chunk(2, dim=-1)
        active, d_hidden = F.silu(gate), torch.empty_like(hidden)
        d_gate, d_up = d_hidden.chunk(2, dim=-1)
        d_product = grouped_linear_input_gradient(gradient, down, bounds)
        torch.mul(d_product, active, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_gate)
        return grouped_linear_input_gradient(d_hidden, gate_up, bounds), (gradient, active.mul_(up), d_hidden, rows)

    def weight_gradients(self, counts: Sequence[int], kept: Tensors) -> Tensors:
        gradient, product, d_hidden, rows = kept
        bounds = Bounds(counts, rows.device, self.backend)
        return grouped_linear_weight_gradient(d_hidden, rows, bounds), grouped_linear_weight_gradient(gradient, product, bounds)
