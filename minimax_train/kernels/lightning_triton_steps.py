"""The steps of lightning_steps.py on a GPU: the passes of lightning_triton.py with tables of states, a row per slot."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimax_train.kernels import lightning_triton as passes
from minimax_train.kernels.lightning_steps import Kept, LocalDocuments


@dataclass(frozen=True, kw_only=True)
class TritonSteps:
    """Kept between steps: the states between segments (lightning_triton.Cut.slots of them), and their gradients."""

    slopes: Tensor
    cut: passes.Cut
    layout: passes.Tiles
    enters: bool
    """Whether any document starts from another rank's state."""
    leaves: bool

    @classmethod
    def of(
        cls, slopes: Tensor, documents: LocalDocuments, *, dtype: torch.dtype, head_size: int, length: int | None = None,
        layout: passes.Tiles | None = None,
    ) -> "TritonSteps":  # fmt: skip
        """Cuts the row; `length` of a segment and `layout` by lightning_triton's rules where None."""
        length, layout = passes.plan(
            rows=1, tokens=documents.bounds[-1], heads=len(slopes), size=head_size, dtype=dtype, device=slopes.device,
            length=length, layout=layout,
        )  # fmt: skip
        like = documents.cu_seqlens
        with torch.cuda.device_of(like):
            enters, leaves = documents.tables
            cut = passes.cut_row(like, documents.bounds[-1], length, rows=len(documents.enters), enters=enters, leaves=leaves)
        return cls(
            slopes=slopes,
            cut=cut,
            layout=layout,
            enters=max(documents.enters, default=-1) >= 0,
            leaves=max(documents.leaves, default=-1) >= 0,
        )

    def prepare(self, qkv: Tensor) -> Tensor:
        return torch.nn.functional.silu(qkv).contiguous()

    def end_states(self, qkv: Tensor) -> tuple[Tensor, Kept]:
        _, k, v = qkv.unbind(2)
        return self._states(k, v, ends=self.leaves, reverse=False)

    def outputs(self, qkv: Tensor, initial: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        q, k, v = qkv.unbind(2)
        with torch.cuda.device_of(qkv):
            o = passes.outputs(q, k, v, self.slopes, self.cut, self.layout, kept[0], initial if self.enters else None)
        return o, kept

    def initial_gradient(self, qkv: Tensor, do: Tensor) -> tuple[Tensor, Kept]:
        return self._states(qkv.select(2, 0), _rows_apart(do), ends=self.enters, reverse=True)

    def gradients(self, qkv: Tensor, initial: Tensor, do: Tensor, d_ends: Tensor, kept_outputs: Kept, kept_gradient: Kept) -> Tensor:
        q, k, v = qkv.unbind(2)
        dqkv, do = torch.empty_like(qkv), _rows_apart(do)
        dq, dk, dv = dqkv.unbind(2)
        (slots,), (dslots,) = kept_outputs, kept_gradient
        given, back = initial if self.enters else None, d_ends if self.leaves else None
        with torch.cuda.device_of(qkv):
            passes.query_gradient((q, k, v), do, self.slopes, self.cut, self.layout, slots, given, dq)
            passes.key_value_gradient((q, k, v), do, self.slopes, self.cut, self.layout, dslots, back, dk, dv)
        return dqkv

    def _states(self, k: Tensor, v: Tensor, *, ends: bool, reverse: bool) -> tuple[Tensor, Kept]:
        with torch.cuda.device_of(k):
            slots, last = passes.local_states(k, v, self.slopes, self.cut, self.layout, ends=ends, reverse=reverse)
        return slots.new_zeros((self.cut.rows, *slots.shape[1:])) if last is None else last, (slots,)


def _rows_apart(do_THD: Tensor) -> Tensor:
    """With a contiguous last dimension, as the kernels read it."""
    return do_THD if do_THD.stride(-1) == 1 else do_THD.contiguous()
