"""What the model is built from: linears and embeddings that may be sharded, made by the engine.

The model says *which* matrix it needs and how it may be cut; the engine says what makes it (megatron-core's tensor-parallel linears)
and how the ranks share it. Between the mixers and in the experts a rank holds its own tokens of the row, T of them; inside a mixer and
in the head, all tokens of the tensor-parallel group, S = tensor * T of them, and its own heads, channels or vocabulary rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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

    def experts(self, *shape: int, axis: int, matrices: int = 1, dtype: torch.dtype) -> nn.Parameter:
        """A weight of the experts, of whole shape `shape`, experts first; not yet filled. This rank has its experts, and of them its
        slice along `axis`, along which `matrices` matrices are stacked: it has a slice of each."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A parameter is one rank's part of the whole along an axis."""

    axis: int
    rank: int
    ranks: int
    matrices: int = 1
    """So many matrices are stacked along the axis, and the rank has its part of each."""


def cuts_of(parameter: Tensor) -> tuple[Cut, ...]:
    """How a parameter is cut over the ranks, by axis (the maker's attribute `cuts`); () where every rank has the whole."""
    cuts: tuple[Cut, ...] = getattr(parameter, "cuts", ())
    return cuts


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    shape = list(parameter.shape)
    for cut in cuts_of(parameter):
        shape[cut.axis] *= cut.ranks
    return tuple(shape)


def part_of(whole: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """This rank's part of `whole`."""
    for cut in cuts:
        matrices = whole.chunk(cut.matrices, cut.axis)
        whole = torch.cat([matrix.chunk(cut.ranks, cut.axis)[cut.rank] for matrix in matrices], cut.axis)
    return whole
