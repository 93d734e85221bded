"""Operators of the model, each with a definition in plain torch and faster forms of the same function. Needs torch alone."""

import importlib.util
import itertools

import torch
from torch import Tensor

from minimax_train.kernels.lightning import define
from minimax_train.kernels.lightning_cpu import attend

__all__ = ["best_lightning_backend", "lightning_attention"]

BACKENDS = ("definition", "cpu", "triton")
TRITON_HEAD_SIZES = (64, 128)


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

    q, k, v        `[B, T, H, D]`, one dtype (fp32, bf16, fp16, fp64), any strides
    slopes         `[H]` fp32, s >= 0 per head; gets no gradient
    cu_seqlens     int32 or int64 `[documents + 1]`, any device: where the documents of the one row (B = 1) start. It begins with 0, ends
                   with T and never falls; equal neighbours are an empty document. The state starts anew at each document. "triton"
                   checks its values only where they are on the CPU: reading them from a GPU would stop its queue.
    initial_state  `[N, H, D, D]`, the state before each document's first token, zero if None; N = documents, or B without cu_seqlens
    backend        "definition" (a token at a time), "cpu" (blocks of tokens), "triton" (a GPU; heads of 64 or 128), None: the best here

    Returns o `[B, T, H, D]` in q's dtype and the state after each document's last token `[N, H, D, D]`, state[d_k, d_v].
    States and decays are fp32 whatever q's dtype, except fp64 where q is fp64 (so that gradients can be checked numerically).
    "triton" rounds a state to q's dtype where it is a factor of a product. fp16 ends at 65,504: where nothing decays, 200K tokens of
    positive inputs add up to more, and o and the gradients are inf or NaN. Take bf16 or fp32 for slow decays over long documents.
    Gradients flow to q, k, v and initial_state, from both results.
    Raises ValueError where shapes, dtypes or cu_seqlens do not fit, or for a backend that is not here.
    """
    _check(q, k, v, slopes, initial_state, cu_seqlens)
    name, slopes = _choose(backend, q), slopes.detach()
    q_THD, k_THD, v_THD = (x.flatten(0, 1) for x in (q, k, v))  # rows of a batch are documents of one packed row
    if name == "triton":
        from minimax_train.kernels import lightning_triton

        o, final_state = lightning_triton.lightning_attention(
            q_THD, k_THD, v_THD, slopes, _on_device(cu_seqlens, q), initial_state, rows=q.shape[0], final=True
        )
        assert final_state is not None
        return o.view(q.shape), final_state
    bounds, initial = _on_host(cu_seqlens, q, initial_state)
    o, final_state = (attend if name == "cpu" else define)(q_THD, k_THD, v_THD, slopes, bounds, initial)
    return o.view(q.shape), final_state


def best_lightning_backend(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """ "cpu" on a CPU; on a GPU "triton" where it is installed and takes the dtype and head size, else "definition"."""
    if device.type == "cpu":
        return "cpu"
    fits = head_size in TRITON_HEAD_SIZES and dtype in (torch.bfloat16, torch.float16, torch.float32)
    return "triton" if fits and importlib.util.find_spec("triton") else "definition"


def _choose(backend: str | None, q: Tensor) -> str:
    """The backend asked for, checked, or the best for q."""
    if backend is None:
        return best_lightning_backend(q.device, q.dtype, q.shape[-1])
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} of lightning_attention is not available; choose 'definition', 'cpu', 'triton' or None")
    if backend == "cpu" and q.device.type != "cpu":
        raise ValueError(f"backend 'cpu' of lightning_attention was given tensors on {q.device}; move them or choose another backend")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("backend 'triton' of lightning_attention needs the package triton, which is not installed; choose another")
    return backend


def _check(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError for shapes and dtypes that do not fit."""
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k, v are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; all must be one [batch, tokens, heads, head size]"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be one floating-point dtype")
    rows, _, heads, size = q.shape
    if slopes.shape != (heads,) or slopes.dtype != torch.float32:
        raise ValueError(f"slopes are {slopes.dtype} {list(slopes.shape)}; they must be torch.float32 [heads] = [{heads}]")
    if cu_seqlens is not None and rows != 1:
        raise ValueError(f"cu_seqlens was given with a batch of {rows} rows; pack the documents into one row")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or not len(cu_seqlens)):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; it must be int32 or int64 [documents + 1]")
    shape = (rows if cu_seqlens is None else len(cu_seqlens) - 1, heads, size, size)
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(
            f"initial_state is {list(initial_state.shape)}; it must be [documents, heads, head size, head size] = {list(shape)}"
        )


def _on_device(cu_seqlens: Tensor | None, q: Tensor) -> Tensor:
    """Where documents start in the packed row of B x T tokens, int32 on q's device; values are checked where that needs no waiting."""
    rows, tokens = q.shape[:2]
    if rows * tokens >= 1 << 31:
        raise ValueError(f"q has {rows} x {tokens} tokens; a call takes fewer than 2^31")
    if cu_seqlens is None:
        return torch.arange(rows + 1, dtype=torch.int32, device=q.device) * tokens
    if cu_seqlens.device.type == "cpu":
        _bounds(cu_seqlens, q)
    return cu_seqlens.to(q.device, torch.int32, non_blocking=True).contiguous()


def _on_host(cu_seqlens: Tensor | None, q: Tensor, initial_state: Tensor | None) -> tuple[list[int], Tensor]:
    """Where documents start in the packed row (and its end), and the states they start from, in the states' dtype."""
    heads, size = q.shape[2:]
    bounds = _bounds(cu_seqlens, q)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if initial_state is None:
        return bounds, q.new_zeros((len(bounds) - 1, heads, size, size), dtype=dtype)
    return bounds, initial_state.to(dtype)


def _bounds(cu_seqlens: Tensor | None, q: Tensor) -> list[int]:
    """Where documents start in the packed row, and its end; checked."""
    rows, tokens = q.shape[:2]
    if cu_seqlens is None:
        return [row * tokens for row in range(rows + 1)]
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in itertools.pairwise(bounds)):
        given = bounds if len(bounds) <= 8 else f"[{bounds[0]}, ..., {bounds[-1]}] ({len(bounds)} numbers)"
        raise ValueError(f"cu_seqlens is {given}; it must begin with 0, never fall and end with the row's length {tokens}")
    return bounds
