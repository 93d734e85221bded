"""What the model is built from: linears and embeddings that may be sharded, made by the engine.

The model says *which* matrix it needs and how it may be cut; the engine says what makes it (megatron-core's tensor-parallel
linears). `axis` of a sharded parameter is the dimension cut over the tensor-parallel group.
"""

from typing import Protocol

import torch
from torch import nn

from minimax_train.kernels.choice import Backends


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

    def column(self, inputs: int, outputs: int) -> nn.Module:
        """y = x W^T, W `[outputs, inputs]` cut over outputs: `[T, inputs]` -> `[T, outputs / tensor]`."""
        ...

    def row(self, inputs: int, outputs: int) -> nn.Module:
        """y = x W^T, W `[outputs, inputs]` cut over inputs: `[T, inputs / tensor]` -> `[T, outputs]`, summed over the group."""
        ...

    def head(self, inputs: int, outputs: int, *, fp32: bool) -> nn.Module:
        """A column whose call takes labels too: `[T, inputs]`, int64 `[T]` -> losses `[T]`; without labels, logits. `fp32`: in fp32."""
        ...

    def embedding(self, rows: int, size: int) -> nn.Module:
        """Lookup in E `[rows, size]`, cut over rows: int64 `[T]` -> `[T, size]`."""
        ...
