"""Softmax attention over part of the keys, with what is needed to add the parts up: the log-sum-exp of each query's scores.

    s_ij = q_i . k_j / sqrt(D)        lse_i = log sum_j exp(s_ij)        o_i = sum_j exp(s_ij - lse_i) v_j

G key-value heads serve H / G query heads each. Parts over disjoint keys merge: lse = logaddexp(lse_1, lse_2) and
o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2. Given the MERGED o and lse, each part's backward is its share of the whole gradient
(p_ij = exp(s_ij - lse_i) is the whole softmax; Blockwise and Ring Attention, arXiv 2305.19370 and 2310.01889), so nothing else is saved.

definition  plain torch: any device and dtype; memory for all scores of a document
sdpa        the CPU operator behind torch's scaled_dot_product_attention
varlen      torch's flash attention on a GPU, as torch.nn.attention.varlen calls it
flash       flash-attn 2.7 or later; on Hopper FlashAttention-3 where it is installed

Transformer Engine has none: its fused backward takes the statistics its own forward kept in an opaque list of tensors, so that merged
ones cannot be given to it. definition and sdpa have been run; varlen and flash were written without a GPU, from the schemas of torch 2.13
and the sources of flash-attn 2 and 3.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minimax_train.kernels.softmax_attention import BACKENDS, hindrance, installed_module, longest_document

Bounds = Sequence[int]
Forward = Callable[[Tensor, Tensor, Tensor, Bounds, Bounds, bool], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Bounds, Bounds, bool], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class PartialAttention:
    """One backend. Bounds are cu_seqlens on the host: document i's queries are rows query_bounds[i] .. query_bounds[i + 1] - 1.

    With `causal` the two bounds are the same and a query sees the keys up to its own row; without, all keys of its document (at least one).
    """

    forward: Forward
    """(q `[n, H, D]`, k `[m, G, D]`, v `[m, G, D]`, query_bounds, key_bounds, causal) -> (o `[n, H, D]`, lse `[n, H]`).

    o is in q's dtype, lse fp32, or fp64 where q is fp64."""
    backward: Backward
    """(do, q, k, v, o, lse, query_bounds, key_bounds, causal) -> (dq, dk, dv) in q's dtype, with the merged o and lse."""


def partial_attention(backend: str, *, device: torch.device, dtype: torch.dtype, head_size: int) -> PartialAttention:
    """The parts of a softmax backend: "definition" or one of softmax_attention.BACKENDS.

    For "te" the best of flash and varlen, for "sdpa" on a GPU the definition: neither returns a log-sum-exp that its backward would take.
    Raises ValueError where the backend is unknown, not installed, or does not take this device, dtype or head size.
    """
    if backend == "te":
        backend = next((name for name in ("flash", "varlen") if hindrance(name, device, dtype, head_size) is None), "sdpa")
    if backend == "definition" or (backend == "sdpa" and device.type != "cpu"):
        return PartialAttention(forward=_define_forward, backward=_define_backward)
    if backend not in BACKENDS:
        raise ValueError(f"softmax backend {backend!r} is unknown; choose one of definition, {', '.join(BACKENDS)}")
    reason = hindrance(backend, device, dtype, head_size)
    if reason is not None:
        raise ValueError(f"softmax backend {backend!r} {reason}; choose definition, or sdpa on a CPU")
    if backend == "sdpa":
        return PartialAttention(forward=_sdpa_forward, backward=_sdpa_backward)
    if backend == "varlen":
        return PartialAttention(forward=_varlen_forward, backward=_varlen_backward)
    name = installed_module("flash", device)
    module = importlib.import_module(name if name == "flash_attn_interface" else "flash_attn.flash_attn_interface")
    return _flash_3(module) if name == "flash_attn_interface" else _flash_2(module)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """`[n, H, m]`, minus infinity where a query does not look."""
    s = torch.einsum("ihd,jhd->ihj", q, k) / q.shape[2] ** 0.5
    if causal:
        place = torch.arange(len(q), device=q.device)
        s = s.masked_fill((place[:, None] < place)[:, None], float("-inf"))
    return s


def _wide(x: Tensor, heads: int) -> Tensor:
    """fp32 (fp64 stays), each key-value head repeated for its query heads."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).repeat_interleave(heads // x.shape[1], 1)


def _define_forward(q: Tensor, k: Tensor, v: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    outputs, sums = [], []
    for (i, j), (a, b) in zip(pairwise(query_bounds), pairwise(key_bounds), strict=True):
        s = _scores(_wide(q[i:j], heads), _wide(k[a:b], heads), causal)
        lse = s.logsumexp(2)
        sums.append(lse)
        outputs.append(torch.einsum("ihj,jhd->ihd", (s - lse[..., None]).exp(), _wide(v[a:b], heads)).to(q.dtype))
    return torch.cat(outputs), torch.cat(sums)


def _define_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    heads, groups = q.shape[1], k.shape[1]
    parts = []
    for (i, j), (a, b) in zip(pairwise(query_bounds), pairwise(key_bounds), strict=True):
        q_, do_, o_ = (_wide(x[i:j], heads) for x in (q, do, o))
        k_, v_ = (_wide(x[a:b], heads) for x in (k, v))
        p = (_scores(q_, k_, causal) - lse[i:j, :, None]).exp()
        ds = p * (torch.einsum("ihd,jhd->ihj", do_, v_) - (do_ * o_).sum(2, keepdim=True)) / q.shape[2] ** 0.5
        dk, dv = torch.einsum("ihj,ihd->jhd", ds, q_), torch.einsum("ihj,ihd->jhd", p, do_)
        dk, dv = (x.unflatten(1, (groups, heads // groups)).sum(2) for x in (dk, dv))
        parts.append((torch.einsum("ihj,jhd->ihd", ds, k_), dk, dv))
    dq, dk, dv = (torch.cat(x).to(q.dtype) for x in zip(*parts, strict=True))
    return dq, dk, dv


def _batched(x: Tensor, start: int, stop: int) -> Tensor:
    """`[T, H, D]` -> one document, `[1, H, rows, D]`."""
    return x[start:stop].transpose(0, 1)[None]


def _sdpa_forward(q: Tensor, k: Tensor, v: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for (i, j), (a, b) in zip(pairwise(query_bounds), pairwise(key_bounds), strict=True):
        if i < j:  # the operator divides by the number of rows
            part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _batched(q, i, j), _batched(k, a, b), _batched(v, a, b), 0.0, causal
            )
            o[i:j], lse[i:j] = part[0].transpose(0, 1), sums[0].T
    return o, lse


def _sdpa_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for (i, j), (a, b) in zip(pairwise(query_bounds), pairwise(key_bounds), strict=True):
        if i < j:
            do_, q_, k_, v_, o_ = (_batched(x, *rows) for x, rows in ((do, (i, j)), (q, (i, j)), (k, (a, b)), (v, (a, b)), (o, (i, j))))
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(do_, q_, k_, v_, o_, lse[i:j].T[None], 0.0, causal)
            for whole, part, (start, stop) in zip((dq, dk, dv), parts, ((i, j), (a, b), (a, b)), strict=True):
                whole[start:stop] = part[0].transpose(0, 1)
    return dq, dk, dv


def _on_device(bounds: Bounds, device: torch.device) -> Tensor:
    """cu_seqlens int32; the copy from pinned memory does not make the host wait for the queue."""
    return torch.tensor(bounds, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _packed(query_bounds: Bounds, key_bounds: Bounds, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """What flash attention is told of documents: cu_seqlens and the longest document, of queries and of keys."""
    queries = _on_device(query_bounds, device)
    keys = queries if query_bounds == key_bounds else _on_device(key_bounds, device)
    return queries, keys, longest_document(query_bounds), longest_document(key_bounds)


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
    packed = _packed(query_bounds, key_bounds, q.device)
    o, lse_HT, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *packed, 0.0, causal, False)
    return o, lse_HT.T


def _varlen_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    packed = _packed(query_bounds, key_bounds, q.device)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    gradients = torch.ops.aten._flash_attention_backward(do.contiguous(), q, k, v, o, lse.T.contiguous(), *packed, 0.0, causal, *no_dropout)
    dq, dk, dv = gradients
    return dq, dk, dv


def _flash_2(module: Any) -> PartialAttention:
    """flash_attn.flash_attn_interface; ImportError where it is older than 2.7 is left to the user to read."""

    def forward(q: Tensor, k: Tensor, v: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
        packed = _packed(query_bounds, key_bounds, q.device)
        o, lse_HT, *_ = module._flash_attn_varlen_forward(q, k, v, *packed, dropout_p=0.0, softmax_scale=q.shape[2] ** -0.5, causal=causal)
        return o, lse_HT.T

    def backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        packed = _packed(query_bounds, key_bounds, q.device)
        module._flash_attn_varlen_backward(
            do, q, k, v, o, lse.T.contiguous(), dq, dk, dv, *packed, dropout_p=0.0, softmax_scale=q.shape[2] ** -0.5, causal=causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return dq, dk, dv

    return PartialAttention(forward=forward, backward=backward)


def _flash_3(module: Any) -> PartialAttention:
    """flash_attn_interface. By position: its versions agree on the order up to `causal`, not on names and defaults."""

    def forward(q: Tensor, k: Tensor, v: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
        queries, keys, longest_query, longest_key = _packed(query_bounds, key_bounds, q.device)
        o, lse_HT, *_ = module._flash_attn_forward(
            q, k, v,
            None, None, None, None,  # k_new, v_new, qv, out
            queries, keys,
            None, None, None,  # cu_seqlens_k_new, seqused_q, seqused_k
            longest_query, longest_key,
            *[None] * 9,  # paging, left padding, rotary, descaling
            q.shape[2] ** -0.5, causal,
        )  # fmt: skip
        return o, lse_HT.T

    def backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, query_bounds: Bounds, key_bounds: Bounds, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        queries, keys, longest_query, longest_key = _packed(query_bounds, key_bounds, q.device)
        module._flash_attn_backward(
            do, q, k, v, o, lse.T.contiguous(), queries, keys,
            None, None,  # seqused_q, seqused_k
            longest_query, longest_key, dq, dk, dv, q.shape[2] ** -0.5, causal,
        )  # fmt: skip
        return dq, dk, dv

    return PartialAttention(forward=forward, backward=backward)
