"""Causal softmax attention over a packed row of documents, by what is installed.

    o_i = sum_{j <= i, same document} softmax_j(q_i . k_j / sqrt(D)) v_j        G key-value heads serve H / G query heads each

sdpa     torch's scaled_dot_product_attention, document by document: any device and dtype, and the definition of the others
varlen   torch.nn.attention.varlen: torch's flash attention over the packed row
te       Transformer Engine's DotProductAttention
flash    flash-attn, of which FlashAttention-3 (flash_attn_interface) where it is installed
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("sdpa", "varlen", "te", "flash")
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, list[int]], Tensor]
"""(q `[T, H, D]`, k `[T, G, D]`, v `[T, G, D]`, cu_seqlens int32 `[N + 1]`, the same on the host) -> o `[T, H, D]`."""


def best_softmax_backend(device: torch.device, dtype: torch.dtype) -> str:
    """flash, te, varlen: the first that is installed, on a GPU in 16 bits; else sdpa."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    return next((name for name in ("flash", "te", "varlen") if _installed(name)), "sdpa")


def causal_attention(backend: str, *, heads: int, key_value_heads: int, head_size: int) -> Attend:
    """The function of one backend. Raises ValueError where it is unknown or not installed.

    Only sdpa has run on the machine this was written on, which has no GPU.
    """
    if backend not in BACKENDS:
        raise ValueError(f"softmax backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if not _installed(backend):
        raise ValueError(f"softmax backend {backend!r} is not installed here; choose one of {', '.join(filter(_installed, BACKENDS))}")
    if backend == "te":
        return _transformer_engine(heads, key_value_heads, head_size)
    return {"sdpa": _sdpa, "varlen": _varlen, "flash": _flash}[backend]


def _installed(backend: str) -> bool:
    modules = {"flash": ("flash_attn_interface", "flash_attn"), "te": ("transformer_engine",), "varlen": ("torch.nn.attention.varlen",)}
    return backend == "sdpa" or any(importlib.util.find_spec(name) for name in modules[backend])


def _sdpa(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
    outputs = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


def _longest(bounds: list[int]) -> int:
    return max((stop - start for start, stop in zip(bounds, bounds[1:], strict=False)), default=0)


def _varlen(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest, repeat = _longest(bounds), q_THD.shape[1] // k_TGD.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (k_TGD, v_TGD))  # grouped queries and the name of `causal` differ between versions
    newer = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if newer else {"is_causal": True}
    o = varlen_attn(q_THD, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal)
    assert isinstance(o, Tensor)
    return o


def _flash(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    longest = _longest(bounds)
    out = flash_attn_varlen_func(q_THD, k_TGD, v_TGD, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    o: Tensor = out[0] if isinstance(out, tuple) else out  # some versions of FlashAttention-3 return the log-sum-exp too
    return o


def _transformer_engine(heads: int, key_value_heads: int, head_size: int) -> Attend:
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        heads, head_size, num_gqa_groups=key_value_heads, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding_causal"
    )

    def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
        longest = _longest(bounds)
        o: Tensor = module(
            q_THD, k_TGD, v_TGD, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        return o.view(q_THD.shape)

    return attend
