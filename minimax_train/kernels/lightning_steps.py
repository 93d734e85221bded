"""Lightning attention in steps, for a row of tokens that is a part of a longer one: states go to other ranks between the steps.

A document that runs across ranks needs, on each, the state that enters its local tokens. With lam = exp(-s) and n local tokens:

    forward   ends = end_states(qkv)              E = sum_j lam^(n-1-j) k_j^T v_j, from a state of zero
              ... exchange: the state S that enters (initial) is what other ranks' E make of it; S' = lam^n S + E leaves ...
              o    = outputs(qkv, initial)        o_i = q_i S_i, S_i the state after token i
    backward  dS_o = initial_gradient(qkv, do)    sum_i lam^(i+1) q_i^T do_i, from o alone
              ... exchange, the other way: dS' that comes back (d_ends); dS = dS_o + lam^n dS' goes on ...
              dqkv = gradients(qkv, initial, do, d_ends)

What passes through a rank, lam^n S and lam^n dS', is the caller's: known without looking at a token. A local row holds thousands of
documents of which few cross its ends, and a state is 4 MiB in the real model: states exist per slot, never per document.

Legend: T local tokens, H heads, D head size, N local documents.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from minimax_train.kernels import lightning_cpu
from minimax_train.kernels.lightning import define

Kept = tuple[Tensor, ...]
"""What one step leaves for a later one: tensors that an autograd Function saves."""


@dataclass(frozen=True, kw_only=True)
class LocalDocuments:
    """The documents of a local row, bounds[n] .. bounds[n + 1] - 1, and which of them exchange states with other ranks.

    Raises ValueError for bounds or slots that do not fit.
    """

    cu_seqlens: Tensor
    """int32 `[N + 1]` on the device of the tokens."""
    bounds: list[int]
    """The same numbers on the host."""
    enters: tuple[int, ...]
    """Per slot: the document that starts from initial[slot], or -1."""
    leaves: tuple[int, ...]
    """Per slot: the document whose end state is ends[slot], or -1."""

    def __post_init__(self) -> None:
        documents = len(self.bounds) - 1
        if self.cu_seqlens.shape != (documents + 1,) or self.cu_seqlens.dtype != torch.int32:
            given = f"{self.cu_seqlens.dtype} {list(self.cu_seqlens.shape)}"
            raise ValueError(
                f"cu_seqlens is {given} beside {documents + 1} bounds; it must be torch.int32 [{documents + 1}], the same numbers"
            )
        if documents < 0 or self.bounds[0] != 0 or any(b < a for a, b in itertools.pairwise(self.bounds)):
            raise ValueError(f"bounds of {documents} documents are {self.bounds[:8]}...; they must begin with 0 and never fall")
        for name, slots in (("enters", self.enters), ("leaves", self.leaves)):
            used = [n for n in slots if n != -1]
            if len(slots) != len(self.enters) or len(set(used)) != len(used) or not all(0 <= n < documents for n in used):
                raise ValueError(
                    f"{name} is {slots} beside {len(self.enters)} slots and {documents} documents; "
                    "a slot holds -1 or a document of the row, each document at most once"
                )

    def rows(self, slots: tuple[int, ...]) -> list[int]:
        """Per document its slot in `enters` or `leaves`, or -1."""
        rows = [-1] * (len(self.bounds) - 1)
        for slot, document in enumerate(slots):
            if document >= 0:
                rows[document] = slot
        return rows

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """rows(enters) and rows(leaves) on the device, int32 `[N]`: written there once for all layers, without a copy that waits."""
        enters, leaves = (self.cu_seqlens.new_full((len(self.bounds) - 1,), -1) for _ in range(2))
        for table, slots in ((enters, self.enters), (leaves, self.leaves)):
            for slot, document in enumerate(slots):
                if document >= 0:
                    table[document] = slot
        return enters, leaves

    def span(self, document: int) -> tuple[int, int]:
        """First token and end of a document."""
        return self.bounds[document], self.bounds[document + 1]


class Steps(Protocol):
    """The steps of one layer over one local row. All tensors are arguments and results: nothing is remembered between two calls.

    qkv is `[T, H, 3, D]`, what `prepare` returned; o and do `[T, H, D]`; initial, ends and their gradients `[slots, H, D, D]`, contiguous,
    state[d_k, d_v], fp32 (fp64 for fp64 inputs). Rows of slots that hold no document are not read, and are zero in results. Only
    `prepare` is differentiated by autograd; the others are a caller's autograd Function, without gradient mode.
    """

    def prepare(self, qkv: Tensor) -> Tensor:
        """From the projection's output to what the steps take, differentiable; the SiLU is here or in the steps."""

    def end_states(self, qkv: Tensor) -> tuple[Tensor, Kept]:
        """The end states of the documents in `leaves`, from initial states of zero; and what `outputs` takes as `kept`."""

    def outputs(self, qkv: Tensor, initial: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        """o, the documents in `enters` starting from `initial`; and what `gradients` takes as `kept_outputs`."""

    def initial_gradient(self, qkv: Tensor, do: Tensor) -> tuple[Tensor, Kept]:
        """The gradient of `initial` from o alone; and what `gradients` takes as `kept_gradient`."""

    def gradients(self, qkv: Tensor, initial: Tensor, do: Tensor, d_ends: Tensor, kept_outputs: Kept, kept_gradient: Kept) -> Tensor:
        """The gradient of qkv `[T, H, 3, D]` from both results, o and the end states."""


def lightning_steps(slopes: Tensor, documents: LocalDocuments, *, backend: str, dtype: torch.dtype, head_size: int) -> Steps:
    """The steps for slopes `[H]` (fp32, s >= 0), for q, k, v of `dtype` and heads of `head_size`.

    backend: "definition" (for small tests: it keeps a state per token), "cpu", "triton", as in `lightning_attention`.
    Raises ValueError for another backend, or for one that does not take this dtype or head size here.
    """
    if backend == "triton":
        from minimax_train.kernels.lightning_triton_steps import TritonSteps

        return TritonSteps.of(slopes.detach(), documents, dtype=dtype, head_size=head_size)
    if backend == "cpu" and slopes.device.type == "cpu":
        return CpuSteps(slopes=slopes.detach(), documents=documents)
    if backend == "definition":
        return DefinitionSteps(slopes=slopes.detach(), documents=documents)
    raise ValueError(
        f"backend {backend!r} of lightning_steps is not available on {slopes.device}; choose 'definition', 'triton', or on a CPU 'cpu'"
    )


@dataclass(frozen=True, kw_only=True)
class CpuSteps:
    """Steps of lightning_cpu, which apply SiLU themselves. Memory beyond results: scratch of fixed size, and a state per block of one
    document for backward."""

    slopes: Tensor
    documents: LocalDocuments

    def prepare(self, qkv: Tensor) -> Tensor:
        return qkv

    def end_states(self, qkv: Tensor) -> tuple[Tensor, Kept]:
        _, k, v = qkv.unbind(2)
        return self._sums(k, v, self.documents.leaves, silu=(True, True), reverse=False), ()

    def outputs(self, qkv: Tensor, initial: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        o, borders = lightning_cpu.forward(qkv.unbind(2), self.slopes, self._rows(), initial, None, silu=True)
        return o, (borders,)

    def initial_gradient(self, qkv: Tensor, do: Tensor) -> tuple[Tensor, Kept]:
        return self._sums(qkv.select(2, 0), do, self.documents.enters, silu=(True, False), reverse=True), ()

    def gradients(self, qkv: Tensor, initial: Tensor, do: Tensor, d_ends: Tensor, kept_outputs: Kept, kept_gradient: Kept) -> Tensor:
        dqkv, (borders,) = qkv.new_empty(qkv.shape), kept_outputs
        lightning_cpu.backward(
            qkv.unbind(2), self.slopes, self._rows(), initial, borders, do, d_ends, dqkv.unbind(2), None, silu=True
        )  # fmt: skip
        return dqkv

    def _rows(self) -> lightning_cpu.Documents:
        d = self.documents
        return lightning_cpu.Documents(bounds=d.bounds, enters=d.rows(d.enters), leaves=d.rows(d.leaves))

    def _sums(self, a: Tensor, b: Tensor, slots: tuple[int, ...], *, silu: tuple[bool, bool], reverse: bool) -> Tensor:
        """document_sum of each slot's document, zero where there is none."""
        sums = _zero_states(a, len(slots))
        for total, document in zip(sums, slots, strict=True):
            if document >= 0:
                total.copy_(lightning_cpu.document_sum(a, b, self.slopes, *self.documents.span(document), silu=silu, reverse=reverse))
        return sums


@dataclass(frozen=True, kw_only=True)
class DefinitionSteps:
    """Steps by the definition, their gradients by autograd."""

    slopes: Tensor
    documents: LocalDocuments

    def prepare(self, qkv: Tensor) -> Tensor:
        return torch.nn.functional.silu(qkv)

    def end_states(self, qkv: Tensor) -> tuple[Tensor, Kept]:
        zero = _zero_states(qkv.select(2, 0), 1)
        ends = [zero]
        for document in self.documents.leaves:
            first, end = self.documents.span(document) if document >= 0 else (0, 0)
            q, k, v = qkv[first:end].unbind(2)
            ends.append(define(q, k, v, self.slopes, [0, end - first], zero)[1])
        return torch.cat(ends)[1:], ()

    def outputs(self, qkv: Tensor, initial: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        q, k, v = qkv.unbind(2)
        states = torch.cat((initial, _zero_states(q, 1)))[self.documents.rows(self.documents.enters)]  # row -1 is zero
        return define(q, k, v, self.slopes, self.documents.bounds, states)[0], ()

    def initial_gradient(self, qkv: Tensor, do: Tensor) -> tuple[Tensor, Kept]:
        with torch.enable_grad():
            initial = _zero_states(do, len(self.documents.enters)).requires_grad_()
            o, _ = self.outputs(qkv.detach(), initial, ())
            (gradient,) = torch.autograd.grad((o * do).sum() + 0 * initial.sum(), initial)  # 0 *: a row without tokens has no other
        return gradient, ()

    def gradients(self, qkv: Tensor, initial: Tensor, do: Tensor, d_ends: Tensor, kept_outputs: Kept, kept_gradient: Kept) -> Tensor:
        with torch.enable_grad():
            x = qkv.detach().requires_grad_()
            o, _ = self.outputs(x, initial.detach(), ())
            ends, _ = self.end_states(x)
            (dqkv,) = torch.autograd.grad((o * do).sum() + (ends * d_ends).sum() + 0 * x.sum(), x)
        return dqkv


def _zero_states(like_THD: Tensor, rows: int) -> Tensor:
    """`[rows, H, D, D]` in the dtype of states."""
    _, heads, size = like_THD.shape
    return like_THD.new_zeros((rows, heads, size, size), dtype=torch.promote_types(like_THD.dtype, torch.float32))
