"""Operators of the model, each with a definition in plain torch and faster forms of the same function. Needs torch alone."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from minimax_train.kernels.lightning import define
from minimax_train.kernels.lightning_cpu import attend

__all__ = ["lightning_attention"]

Operator = Callable[[Tensor, Tensor, Tensor, Tensor, list[int], Tensor], tuple[Tensor, Tensor]]


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

    q, k, v      `[B, T, H, D]`, one dtype (fp32, bf16, fp64, fp16), any strides; q's D is v's D
    slopes       `[H]` fp32, s >= 0 per head; gets no gradient
    cu_seqlens   int32 or int64 `[documents + 1]`, any device: where documents start in the one row (B = 1). It starts at 0, ends at T
                 and never falls; equal neighbours are an empty document. The state starts anew at each document.
    initial_state  `[N, H, D, D]`, the state before each document's first token, zero if None; N = documents, or B without cu_seqlens
    backend      "definition" (a token at a time), "cpu" (blocks), None: the best for q's device

    Returns o `[B, T, H, D]` in q's dtype and the state after each document's last token `[N, H, D, D]`, state[d_k, d_v].
    States and decays are fp32 whatever the dtype of q (fp64 where q is fp64, so that gradients can be checked numerically).
    Gradients flow to q, k, v and initial_state, from both results.
    Raises ValueError where shapes, dtypes or cu_seqlens do not fit, or for a backend that is not here.
    """
    _check_tensors(q, k, v, slopes)
    rows, tokens, heads, size = q.shape
    bounds = _document_bounds(cu_seqlens, rows, tokens)
    state_dtype = torch.promote_types(q.dtype, torch.float32)
    state_shape = (len(bounds) - 1, heads, size, size)
    if initial_state is None:
        initial_state = q.new_zeros(state_shape, dtype=state_dtype)
    if initial_state.shape != state_shape:
        raise ValueError(
            f"initial_state is {list(initial_state.shape)}; it must be [documents, heads, head size, head size] = {list(state_shape)}"
        )
    operator = _operator(backend, q.device)
    # Rows of a batch are documents of one packed row.
    packed = (x.reshape(rows * tokens, heads, size) for x in (q, k, v))
    o, final_state = operator(*packed, slopes.detach(), bounds, initial_state.to(state_dtype))
    return o.view(rows, tokens, heads, size), final_state


def _operator(backend: str | None, device: torch.device) -> Operator:
    operators: dict[str, Operator] = {"definition": define, "cpu": attend}
    name = backend or ("cpu" if device.type == "cpu" else "definition")
    if name not in operators:
        raise ValueError(f"lightning_attention backend {name!r} is not here; choose one of {sorted(operators)} or None")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"lightning_attention backend 'cpu' was given tensors on {device}; move them or choose 'definition'")
    return operators[name]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> None:
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k, v are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; all must be one [batch, tokens, heads, head size]")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be one floating-point dtype")
    if slopes.shape != (q.shape[2],) or slopes.dtype != torch.float32:
        raise ValueError(f"slopes are {slopes.dtype} {list(slopes.shape)}; they must be torch.float32 [heads] = [{q.shape[2]}]")


def _document_bounds(cu_seqlens: Tensor | None, rows: int, tokens: int) -> list[int]:
    """Where each document starts in the packed row, and the row's end."""
    if cu_seqlens is None:
        return [row * tokens for row in range(rows + 1)]
    if rows != 1:
        raise ValueError(f"cu_seqlens was given with a batch of {rows} rows; pack the documents into one row")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; it must be int32 or int64 [documents + 1]")
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens is {_brief(bounds)}; it must start at 0, never fall and end at the row's length {tokens}")
    return bounds


def _brief(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{numbers[0]}, ..., {numbers[-1]}] ({len(numbers)} numbers)"
