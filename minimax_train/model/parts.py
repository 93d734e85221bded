"""What the model is built from: linears and embeddings that may be sharded, made by the engine.

The model says *which* matrix it needs and how it may be cut; the engine says what makes it (megatron-core's tensor-parallel linears)
and how the ranks share it. Between the mixers and in the experts a rank holds its own tokens of the row, T of them; inside a mixer and
in the head, all tokens of the tensor-parallel group, S = tensor * T of them, and its own heads, channels or vocabulary rows.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from minimax_train.kernels.choice import Backends
from minimax_train.model.router_options import RouterOptions
from parallel.groups import Groups


class Parts(Protocol):
    """Makers of the model's parameters. Each returned module maps a Tensor to a Tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; routers are fp32 whatever it is."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def backends(self) -> Backends:
        """Which form of each operator the layers run."""
        ...

    @property
    def router(self) -> RouterOptions:
        """How routers are trained."""
        ...

    @property
    def groups(self) -> Groups:
        """Who else there is."""
        ...

    @property
    def total(self) -> Callable[[Tensor], Tensor] | None:
        """Sums a tensor over the tensor-parallel group, without gradient; None where there is one rank."""
        ...

    @property
    def ranks(self) -> int:
        """Ranks of the tensor-parallel group."""
        ...

    def mine(self, size: int) -> range:
        """This rank's of `size` heads, channels or vocabulary rows, which are cut evenly over the tensor-parallel group."""
        ...

    def column(self, inputs: int, outputs: int) -> nn.Module:
        """y = x W^T, W `[outputs, inputs]` cut over outputs: `[T, inputs]` -> `[S, outputs / tensor]`."""
        ...

    def row(self, inputs: int, outputs: int) -> nn.Module:
        """y = x W^T, W `[outputs, inputs]` cut over inputs: `[S, inputs / tensor]` -> `[T, outputs]`."""
        ...

    def head(self, inputs: int, outputs: int, *, fp32: bool) -> nn.Module:
        """A column whose call takes labels too: `[T, inputs]`, int64 `[S]` -> losses `[S]`; without labels, logits `[S, outputs]`. Both
        are the same on all ranks of the group. `fp32`: in fp32."""
        ...

    def embedding(self, rows: int, size: int) -> nn.Module:
        """Lookup in E `[rows, size]`, cut over rows: int64 `[S]` -> `[T, size]`."""
        ...

    def replicated(self, *shape: int, dtype: torch.dtype) -> nn.Parameter:
        """A weight that every rank of the group has whole and uses on its own tokens; not yet filled."""
        ...

    def sharded(self, size: int, *, dtype: torch.dtype) -> nn.Parameter:
        """A weight `[size / tensor]`: the channels of this rank's heads; not yet filled."""
        ...

    def experts(self, *shape: int, dtype: torch.dtype) -> nn.Parameter:
        """A weight of the experts, experts first; not yet filled."""
        ...


def cut_axis(parameter: Tensor) -> int | None:
    """The axis along which a parameter is this rank's part of the whole (megatron-core's attribute); None where it is the whole."""
    axis: int = getattr(parameter, "partition_dim", -1)
    return axis if axis >= 0 else None
