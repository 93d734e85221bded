"""Lightning attention on CPU: linear time, batched matrix products over chunks x heads, forward and backward by hand.

Each document is cut into chunks of at most C tokens. A chunk never crosses a document boundary: a document's last chunk is short
(scratch rows behind its tokens are zero; nothing is added to the row itself). Within a chunk of n tokens, 0-based i and j, lam = exp(-s)
(arXiv 2401.04658, algorithms 1 and 2; S is the unscaled state after the last token):

    A_ij = (q_i . k_j) lam^(i-j),  i >= j                  G_ij = (do_i . v_j) lam^(i-j),  i >= j
    o_i  = sum_j A_ij v_j + lam^(i+1) q_i S                dq_i = sum_j G_ij k_j + lam^(i+1) do_i S^T
    S'   = lam^n S + sum_j lam^(n-1-j) k_j^T v_j           dk_j = sum_i G_ij q_i + lam^(n-1-j) v_j dS'^T
    dS   = lam^n dS' + sum_i lam^(i+1) q_i^T do_i          dv_j = sum_i A_ij do_i + lam^(n-1-j) k_j dS'

Chunks are worked on a block at a time, in scratch that is reused: fresh large temporaries cost a page fault per 4 KiB, and products
on strided views fall back to slow loops. Legend: T tokens, H heads, D head size, n chunks of a block, C chunk size, N documents.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST_CHUNK = 64  # in bf16, half of it in fp32: the fastest of 32, 64, 128 at head sizes 32 (fp32), 64 and 128
SHORTEST_CHUNK = 16
BLOCK_NUMBERS = 1 << 18  # numbers in one scratch tensor, 512 tokens of 8 heads x 64: ten of them stay in cache (fastest of 2^16 .. 2^21)
FEWEST_TOKENS = 512  # in a block: one state is kept for backward each block, so that wide models keep few


def attend(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, slopes_H: Tensor, bounds: list[int], initial_NHDD: Tensor) -> tuple[Tensor, Tensor]:
    """One packed row of documents -> (o `[T, H, D]` in q's dtype, the state after each document `[N, H, D, D]`).

    Same function as `lightning.define`, in time linear in T. Products are in q's dtype; states, decays and the sums over chunks in the
    dtype of the states. Memory beyond the results: scratch of fixed size, and one state a block kept for backward.
    """
    o, final = _Attend.apply(q_THD, k_THD, v_THD, slopes_H, bounds, initial_NHDD)
    return o, final


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of a row, bounds[n] .. bounds[n + 1] - 1, and their rows in the tables of states `[rows, H, D, D]`.

    Document n starts from row enters[n] of the initial states (-1: from zero); its end state, or that state's gradient, is row leaves[n]
    of another table (-1: nobody wants it; gradient zero). So thousands of documents of which two have states need two states.
    """

    bounds: list[int]
    enters: Sequence[int]
    leaves: Sequence[int]

    @classmethod
    def with_states(cls, bounds: list[int]) -> "Documents":
        """Row n is document n's."""
        return cls(bounds=bounds, enters=range(len(bounds) - 1), leaves=range(len(bounds) - 1))


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one document: start .. start + length - 1. `opens`, `closes`: it holds the document's first, last token."""

    start: int
    length: int
    document: int
    opens: bool
    closes: bool


def cut(bounds: list[int], size: int) -> Iterator[Chunk]:
    """The chunks, at most `size` tokens each, of documents bounds[n] .. bounds[n + 1] - 1, in order; an empty document has none."""
    for document, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for start in range(first, end, size):
            length = min(size, end - start)
            yield Chunk(start=start, length=length, document=document, opens=start == first, closes=start + length == end)


def chunk_size(bounds: list[int], dtype: torch.dtype) -> int:
    """Tokens in a full chunk: a power of two near the mean document length, so that scratch of short documents is not mostly empty."""
    lengths = [end - first for first, end in zip(bounds, bounds[1:], strict=False) if end > first]
    mean = sum(lengths) // max(len(lengths), 1)
    longest = LONGEST_CHUNK if dtype.itemsize == 2 else LONGEST_CHUNK // 2
    return min(longest, max(SHORTEST_CHUNK, 1 << (mean - 1).bit_length() if mean else 0))


class _Work:
    """What both passes share: the blocks of a row, its decays and the scratch, sized for the largest block."""

    def __init__(self, like_THD: Tensor, slopes_H: Tensor, bounds: list[int], dtype: torch.dtype) -> None:
        _, heads, size = like_THD.shape
        self.chunk = chunk_size(bounds, like_THD.dtype)
        chunks = list(cut(bounds, self.chunk))
        most = max(1, FEWEST_TOKENS // self.chunk, BLOCK_NUMBERS // (self.chunk * heads * size))
        self.blocks = [chunks[i : i + most] for i in range(0, len(chunks), most)]
        self.inner = [i for i, block in enumerate(self.blocks) if not block[0].opens]  # blocks whose first chunk a state enters
        self.shape = (min(most, len(chunks)), heads, self.chunk, size)
        self.like, self.state_dtype = like_THD, dtype
        self.slopes_H11 = slopes_H.to(dtype)[:, None, None]
        position_C = torch.arange(self.chunk, dtype=dtype)
        distance_CC = (position_C[:, None] - position_C).clamp(min=0)
        self.mask_HCC = torch.exp(-self.slopes_H11 * distance_CC).tril()
        self.query_decay_HC1 = torch.exp(-self.slopes_H11 * (position_C[:, None] + 1))

    def rows(self, *, width: int | None = None) -> Tensor:
        """Uninitialised scratch [n, H, C, width] in the dtype of q."""
        return self.like.new_empty((*self.shape[:3], width or self.shape[3]))

    def states(self) -> Tensor:
        """Uninitialised scratch [n + 1, H, D, D] in the dtype of the states."""
        n, heads, _, size = self.shape
        return self.like.new_empty((n + 1, heads, size, size), dtype=self.state_dtype)

    def low(self) -> Tensor:
        """Uninitialised scratch [n, H, D, D] in the dtype of q, for states as factors of products."""
        n, heads, _, size = self.shape
        return self.like.new_empty((n, heads, size, size))

    def decays(self, block: list[Chunk]) -> tuple[Tensor, Tensor]:
        """lam^(n-1-j) `[n, H, C, 1]` and lam^n `[n, H, 1, 1]` for chunks of n tokens."""
        length_n111 = torch.tensor([chunk.length for chunk in block], dtype=self.state_dtype)[:, None, None, None]
        position_C1 = torch.arange(self.chunk, dtype=self.state_dtype)[:, None]
        behind = (length_n111 - 1 - position_C1).clamp(min=0)
        return torch.exp(-self.slopes_H11 * behind), torch.exp(-self.slopes_H11 * length_n111)


def _pairs(x_THD: Tensor, block: list[Chunk], rows_nHCD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of equal shape of the same tokens, in the row and in scratch: one pair if every chunk is full, else one a chunk."""
    size = rows_nHCD.shape[2]
    if all(chunk.length == size for chunk in block):
        yield x_THD[block[0].start : block[-1].start + size].unflatten(0, (-1, size)).transpose(1, 2), rows_nHCD
        return
    for chunk, rows_HCD in zip(block, rows_nHCD.unbind(0), strict=True):
        yield x_THD[chunk.start : chunk.start + chunk.length].transpose(0, 1), rows_HCD[:, : chunk.length]


def _load(x_THD: Tensor, block: list[Chunk], scratch: Tensor, silu: bool) -> Tensor:
    """Copies the block's tokens (or their SiLU) into scratch, zeros behind a short chunk's; returns the part of scratch in use."""
    out = scratch[: len(block)]
    if any(chunk.length < out.shape[2] for chunk in block):
        out.zero_()
    for tokens, rows in _pairs(x_THD, block, out):
        if silu:
            torch.ops.aten.silu.out(tokens, out=rows)
        else:
            rows.copy_(tokens)
    return out


def _store(rows_nHCD: Tensor, block: list[Chunk], out_THD: Tensor, silu_of_THD: Tensor | None = None) -> None:
    """Copies the block's tokens from scratch to `out_THD`; with `silu_of_THD` x, a gradient of SiLU(x) as the gradient of x."""
    if silu_of_THD is None:
        for tokens, rows in _pairs(out_THD, block, rows_nHCD):
            tokens.copy_(rows)
        return
    pairs = zip(_pairs(out_THD, block, rows_nHCD), _pairs(silu_of_THD, block, rows_nHCD), strict=True)
    for (tokens, rows), (inputs, _) in pairs:
        torch.ops.aten.silu_backward.grad_input(rows, inputs, grad_input=tokens)


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a b, or out += a b, batched over the two leading dimensions [n, H]; `out` is contiguous scratch."""
    flat = out.flatten(0, 1)
    if add:
        flat.baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    else:
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=flat)
    return out


def _state_product(a: Tensor, b: Tensor, out_nHDD: Tensor, low_nHDD: Tensor) -> None:
    """out = a^T b, one state a chunk; in bf16 the product is rounded once, on its way into the fp32 state."""
    if a.dtype == out_nHDD.dtype:
        _product(a.mT, b, out_nHDD)
    else:
        out_nHDD.copy_(_product(a.mT, b, low_nHDD))


def _lower(states_nHDD: Tensor, low_nHDD: Tensor) -> Tensor:
    """The states as a factor of a product: themselves, or a copy in q's dtype."""
    return states_nHDD if states_nHDD.dtype == low_nHDD.dtype else low_nHDD.copy_(states_nHDD)


def _take(state: Tensor, table: Tensor, row: int) -> None:
    """state = table[row], or zero where the document has no row."""
    if row < 0:
        state.zero_()
    else:
        state.copy_(table[row])


def _scan(states: Tensor, decay_nH11: Tensor, block: list[Chunk], documents: Documents, initial: Tensor, final: Tensor | None) -> None:
    """On entry states[c + 1] is what chunk c alone adds and states[0] what enters the block; on return states[c] enters chunk c."""
    for c, chunk in enumerate(block):
        if chunk.opens:
            _take(states[c], initial, documents.enters[chunk.document])
        states[c + 1].addcmul_(states[c], decay_nH11[c])
        if final is not None and chunk.closes and documents.leaves[chunk.document] >= 0:
            final[documents.leaves[chunk.document]] = states[c + 1]


def _scan_back(grads: Tensor, decay_nH11: Tensor, block: list[Chunk], documents: Documents, final: Tensor, initial: Tensor | None) -> None:
    """The transpose of _scan: grads[c] gains what grads[c + 1], the gradient of the state after chunk c, hands on through c."""
    for c, chunk in reversed(list(enumerate(block))):
        if chunk.closes:
            _take(grads[c + 1], final, documents.leaves[chunk.document])
        grads[c].addcmul_(grads[c + 1], decay_nH11[c])
        if initial is not None and chunk.opens and documents.enters[chunk.document] >= 0:
            initial[documents.enters[chunk.document]] = grads[c]


def document_sum(a_THD: Tensor, b_THD: Tensor, slopes_H: Tensor, first: int, end: int, *, silu: tuple[bool, bool], reverse: bool) -> Tensor:
    """The state after a document's n tokens first .. end - 1 from zero, sum_j lam^(n-1-j) a_j^T b_j `[H, D, D]`, with (a, b) = (k, v).

    reverse, with (q, do): its transpose sum_i lam^(i+1) a_i^T b_i, the initial state's gradient from the outputs. `silu`: of which of a, b
    the SiLU is meant. Tokens so far off that every head's weight is 0.0 are not read.
    """
    dtype = torch.promote_types(a_THD.dtype, torch.float32)
    read = reach(slopes_H, dtype, end - first)
    work = _Work(a_THD, slopes_H, [first, first + read] if reverse else [end - read, end], dtype)
    a_rows, b_rows, scaled = (work.rows() for _ in range(3))
    products, low = work.states(), work.low()
    total = torch.zeros_like(products[0])
    for block in reversed(work.blocks) if reverse else work.blocks:
        n = len(block)
        key_decay, decay = work.decays(block)
        a_n, b_n = _load(a_THD, block, a_rows, silu[0]), _load(b_THD, block, b_rows, silu[1])
        weighted = torch.mul(a_n, work.query_decay_HC1 if reverse else key_decay, out=scaled[:n])
        _state_product(weighted, b_n, products[:n], low[:n])
        for c in reversed(range(n)) if reverse else range(n):
            torch.addcmul(products[c], total, decay[c], out=total)
    return total


def reach(slopes_H: Tensor, dtype: torch.dtype, tokens: int) -> int:
    """How many of the tokens have a weight exp(-s n) that `dtype` can tell from 0.0 (fp32: 1.4e-45), for the slowest head."""
    limit, slowest = torch.finfo(dtype), float(slopes_H.min())
    return math.ceil(min(tokens, (1 - math.log(limit.smallest_normal * limit.eps)) / max(slowest, limit.smallest_normal)))


def forward(
    qkv: Sequence[Tensor], slopes: Tensor, documents: Documents, initial: Tensor, final: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """o and, for `backward`, the state at each border of two blocks inside a document; writes the end states into `final`, if given."""
    q, k, v = qkv
    work = _Work(q, slopes, documents.bounds, initial.dtype)
    o = q.new_empty(q.shape)
    borders = initial.new_empty((len(work.inner), *initial.shape[1:]))
    q_rows, k_rows, v_rows, o_rows, scaled = (work.rows() for _ in range(5))
    scores, states, low = work.rows(width=work.chunk), work.states(), work.low()
    kept = iter(borders.unbind(0))
    for block in work.blocks:
        n = len(block)
        key_decay, decay = work.decays(block)
        q_n, k_n, v_n = (_load(x, block, rows, silu) for x, rows in ((q, q_rows), (k, k_rows), (v, v_rows)))
        if not block[0].opens:
            next(kept).copy_(states[0])
        _state_product(torch.mul(k_n, key_decay, out=scaled[:n]), v_n, states[1 : n + 1], low[:n])
        _scan(states, decay, block, documents, initial, final)
        o_n = _product(torch.mul(q_n, work.query_decay_HC1, out=scaled[:n]), _lower(states[:n], low[:n]), o_rows[:n])
        _product(_product(q_n, k_n.mT, scores[:n]).mul_(work.mask_HCC), v_n, o_n, add=True)
        _store(o_n, block, o)
        states[0] = states[n]
    return o, borders


def backward(
    qkv: Sequence[Tensor],
    slopes: Tensor,
    documents: Documents,
    initial: Tensor,
    borders: Tensor,
    do: Tensor,
    dfinal: Tensor,
    dqkv: Sequence[Tensor],
    dinitial: Tensor | None,
    silu: bool,
) -> None:
    """Writes the gradients of q, k, v into `dqkv` and of the initial states into `dinitial`, if given; from the last block to the first."""
    (q, k, v), (dq, dk, dv) = qkv, dqkv
    work = _Work(q, slopes, documents.bounds, initial.dtype)
    q_rows, k_rows, v_rows, do_rows, keys, scaled, out = (work.rows() for _ in range(7))
    scores, states, grads, low = work.rows(width=work.chunk), work.states(), work.states(), work.low()
    entering, kept = torch.zeros_like(states[0]), reversed(borders.unbind(0))
    for block in reversed(work.blocks):
        n = len(block)
        key_decay, decay = work.decays(block)
        q_n, k_n, v_n = (_load(x, block, rows, silu) for x, rows in ((q, q_rows), (k, k_rows), (v, v_rows)))
        do_n = _load(do, block, do_rows, False)
        keys_n, scaled_n, out_n, scores_n, low_n = keys[:n], scaled[:n], out[:n], scores[:n], low[:n]
        if not block[0].opens:
            states[0] = next(kept)
        grads[n] = entering
        _state_product(torch.mul(k_n, key_decay, out=keys_n), v_n, states[1 : n + 1], low_n)
        _scan(states, decay, block, documents, initial, None)
        _state_product(torch.mul(q_n, work.query_decay_HC1, out=scaled_n), do_n, grads[:n], low_n)
        _scan_back(grads, decay, block, documents, dfinal, dinitial)
        entering.copy_(grads[0])

        after = _lower(grads[1 : n + 1], low_n)  # gradient of the state after each chunk
        _product(keys_n, after, out_n)
        _product(_product(q_n, k_n.mT, scores_n).mul_(work.mask_HCC).mT, do_n, out_n, add=True)
        _store(out_n, block, dv, v if silu else None)
        _product(torch.mul(v_n, key_decay, out=scaled_n), after.mT, out_n)
        _product(_product(do_n, v_n.mT, scores_n).mul_(work.mask_HCC).mT, q_n, out_n, add=True)
        _store(out_n, block, dk, k if silu else None)
        before = _lower(states[:n], low_n)  # state that enters each chunk
        _product(torch.mul(do_n, work.query_decay_HC1, out=scaled_n), before.mT, out_n)
        _product(scores_n, k_n, out_n, add=True)
        _store(out_n, block, dq, q if silu else None)


class _Attend(torch.autograd.Function):
    """Saves the inputs and the state at each block border; backward rebuilds the rest block by block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: list[int], initial: Tensor) -> tuple[Tensor, Tensor]:
        ctx.documents = Documents.with_states(bounds)
        final = initial.clone()  # of an empty document it is the initial state
        o, borders = forward((q, k, v), slopes, ctx.documents, initial, final, silu=False)
        ctx.save_for_backward(q, k, v, slopes, initial, borders)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, Tensor]:
        q, k, v, slopes, initial, borders = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        dinitial = dfinal.clone()
        backward((q, k, v), slopes, ctx.documents, initial, borders, do, dfinal, (dq, dk, dv), dinitial, silu=False)
        return dq, dk, dv, None, None, dinitial
