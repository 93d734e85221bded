"""Operators of the model, each with a definition in plain torch and faster forms of the same function. Needs torch alone."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_train.kernels.lightning import define
from minimax_train.kernels.lightning_cpu import attend, attend_silu

__all__ = ["lightning_attention", "silu_lightning_attention"]


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with decay (MiniMax-01, arXiv 2501.08313 section 2; arXiv 2401.04658 eq. 3-5), unscaled.

        S_t = exp(-s) S_{t-1} + k_t^T v_t        o_t = q_t S_t          per head; S is [D, D]

    q, k, v        `[B, T, H, D]`, one dtype (fp32, bf16, fp64), any strides
    slopes         `[H]` fp32, s >= 0 per head; gets no gradient
    cu_seqlens     int32 or int64 `[documents + 1]`, any device: where the documents of the one row (B = 1) start. It begins with 0, ends
                   with T and never falls; equal neighbours are an empty document. The state starts anew at each document.
    initial_state  `[N, H, D, D]`, the state before each document's first token, zero if None; N = documents, or B without cu_seqlens
    backend        "definition" (a token at a time), "cpu" (blocks of tokens), None: the best for q's device

    Returns o `[B, T, H, D]` in q's dtype and the state after each document's last token `[N, H, D, D]`, state[d_k, d_v].
    States and decays are fp32 whatever q's dtype, except fp64 where q is fp64 (so that gradients can be checked numerically).
    Gradients flow to q, k, v and initial_state, from both results.
    Raises ValueError where shapes, dtypes or cu_seqlens do not fit, or for a backend that is not here.
    """
    bounds, initial = _prepare(q, k, v, slopes, cu_seqlens, initial_state)
    operator = attend if _choose(backend, q.device) == "cpu" else define
    q_THD, k_THD, v_THD = (x.flatten(0, 1) for x in (q, k, v))  # rows of a batch are documents of one packed row
    o, final_state = operator(q_THD, k_THD, v_THD, slopes.detach(), bounds, initial)
    return o.view(q.shape), final_state


def silu_lightning_attention(
    qkv: Tensor, slopes: Tensor, *, cu_seqlens: Tensor | None = None, initial_state: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """lightning_attention(q, k, v, ...) with q, k, v = SiLU(qkv).unbind(3): what the layer computes from its projection.

    qkv is `[B, T, H, 3, D]`; all else as in lightning_attention. On CPU this spares three large tensors: SiLU(qkv), its gradient, and
    the gradients of q, k and v stacked into one.
    """
    if qkv.dim() != 5 or qkv.shape[3] != 3:
        raise ValueError(f"qkv is {list(qkv.shape)}; it must be [batch, tokens, heads, 3, head size]")
    if _choose(backend, qkv.device) != "cpu":
        q, k, v = F.silu(qkv).unbind(3)
        return lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens, initial_state=initial_state, backend=backend)
    q, k, v = qkv.unbind(3)
    bounds, initial = _prepare(q, k, v, slopes, cu_seqlens, initial_state)
    o, final_state = attend_silu(qkv.flatten(0, 1), slopes.detach(), bounds, initial)
    return o.view(q.shape), final_state


def _choose(backend: str | None, device: torch.device) -> str:
    name = backend or ("cpu" if device.type == "cpu" else "definition")
    if name not in ("definition", "cpu"):
        raise ValueError(f"backend {name!r} of lightning_attention is not available; choose 'definition', 'cpu' or None (the best here)")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' of lightning_attention was given tensors on {device}; move them to cpu or choose another backend")
    return name


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None
) -> tuple[list[int], Tensor]:
    """Checks every argument; returns where documents start in the packed row (and its end), and the states they start from."""
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k, v are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; all must be one [batch, tokens, heads, head size]"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be one floating-point dtype")
    rows, tokens, heads, size = q.shape
    if slopes.shape != (heads,) or slopes.dtype != torch.float32:
        raise ValueError(f"slopes are {slopes.dtype} {list(slopes.shape)}; they must be torch.float32 [heads] = [{heads}]")
    bounds = [row * tokens for row in range(rows + 1)] if cu_seqlens is None else _document_bounds(cu_seqlens, rows, tokens)
    shape, dtype = (len(bounds) - 1, heads, size, size), torch.promote_types(q.dtype, torch.float32)
    if initial_state is None:
        return bounds, q.new_zeros(shape, dtype=dtype)
    if initial_state.shape != shape:
        raise ValueError(
            f"initial_state is {list(initial_state.shape)}; it must be [documents, heads, head size, head size] = {list(shape)}"
        )
    return bounds, initial_state.to(dtype)


def _document_bounds(cu_seqlens: Tensor, rows: int, tokens: int) -> list[int]:
    if rows != 1:
        raise ValueError(f"cu_seqlens was given with a batch of {rows} rows; pack the documents into one row")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; it must be int32 or int64 [documents + 1]")
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in itertools.pairwise(bounds)):
        given = bounds if len(bounds) <= 8 else f"[{bounds[0]}, ..., {bounds[-1]}] ({len(bounds)} numbers)"
        raise ValueError(f"cu_seqlens is {given}; it must begin with 0, never fall and end with the row's length {tokens}")
    return bounds
