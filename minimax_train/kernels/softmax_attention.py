"""Causal softmax attention over a packed row of documents, by what is installed and what it supports.

    o_i = sum_{j <= i, same document} softmax_j(q_i . k_j / sqrt(D)) v_j        G key-value heads serve H / G query heads each

flash    flash-attn; on Hopper FlashAttention-3 (flash_attn_interface) where it is installed
te       Transformer Engine's DotProductAttention
varlen   torch.nn.attention.varlen: torch's flash attention over the packed row
sdpa     torch's scaled_dot_product_attention, document by document: any device and dtype, and the definition of the others

Only sdpa has been run: this was written without a GPU, the other three from the sources of torch 2.11 and 2.13, flash-attn 2 and 3 and
Transformer Engine. On a GPU tests/kernels/test_softmax_attention.py compares those that are installed with the equation in fp64.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("flash", "te", "varlen", "sdpa")
"""Best first."""
LARGEST_HEAD = {"flash": 256, "te": 128, "varlen": 256}
"""Largest head size that can be trained; TE's packed rows are cuDNN's, whose backward stops at 128."""
CAPABILITY = {"flash": 8, "te": 9, "varlen": 8}
"""Least major compute capability; cuDNN takes packed rows from Hopper on."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, list[int]], Tensor]
"""(q `[T, H, D]`, k `[T, G, D]`, v `[T, G, D]`, cu_seqlens int32 `[N + 1]`, the same on the host) -> o `[T, H, D]`."""


def best_softmax_backend(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The first of BACKENDS that nothing hinders here; sdpa on a CPU and in fp32."""
    return next(name for name in BACKENDS if hindrance(name, device, dtype, head_size) is None)


def causal_attention(backend: str, *, heads: int, key_value_heads: int, head_size: int, device: torch.device, dtype: torch.dtype) -> Attend:
    """The function of one backend. `heads` and `key_value_heads` are those of this rank: what the function will be given.

    Raises ValueError where the backend is unknown, not installed, or does not take this device, dtype or head size.
    """
    if backend not in BACKENDS:
        raise ValueError(f"softmax backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    reason = hindrance(backend, device, dtype, head_size)
    if reason is not None:
        others = ", ".join(name for name in BACKENDS if hindrance(name, device, dtype, head_size) is None)
        raise ValueError(f"softmax backend {backend!r} {reason}; choose one of {others}")
    if backend == "flash":
        return _flash(installed_module("flash", device))
    if backend == "te":
        return _transformer_engine(heads, key_value_heads, head_size)
    return _varlen() if backend == "varlen" else _sdpa


def hindrance(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why `backend` cannot run here, None if it can."""
    if backend == "sdpa":
        return None
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16 on a GPU, not {dtype} on {device.type}"
    if head_size % 8 or head_size > LARGEST_HEAD[backend]:
        return f"takes head sizes that are a multiple of 8 up to {LARGEST_HEAD[backend]}, not {head_size}"
    if torch.cuda.get_device_capability(device)[0] < CAPABILITY[backend]:
        return f"needs a GPU of compute capability {CAPABILITY[backend]}.0 or later"
    return None if installed_module(backend, device) else "is not installed here"


def installed_module(backend: str, device: torch.device) -> str:
    """Name of the installed module that has the backend, "" if there is none. Nothing of it is imported."""
    names = {"flash": ["flash_attn"], "te": ["transformer_engine"], "varlen": ["torch.nn.attention.varlen"]}[backend]
    if backend == "flash" and torch.cuda.get_device_capability(device)[0] == 9:
        names = ["flash_attn_interface", *names]
    return next((name for name in names if importlib.util.find_spec(name)), "")


def longest_document(bounds: Sequence[int]) -> int:
    """Tokens of the longest document, from the host's numbers: asking the device would make it wait."""
    return max((stop - start for start, stop in pairwise(bounds)), default=0)


def _sdpa(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
    outputs = []
    for start, stop in pairwise(bounds):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


def _varlen() -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.13 has it, 2.11 has not

    def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
        options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
        if not grouped:
            k_TGD, v_TGD = (x.repeat_interleave(q_THD.shape[1] // x.shape[1], 1) for x in (k_TGD, v_TGD))
        longest = longest_document(bounds)
        o = varlen_attn(q_THD, k_TGD, v_TGD, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), **options)  # causal
        assert isinstance(o, Tensor)
        return o

    return attend


def _flash(module: str) -> Attend:
    function = importlib.import_module(module).flash_attn_varlen_func  # here, so that a broken build is seen before the first step

    def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
        longest = longest_document(bounds)
        out = function(q_THD, k_TGD, v_TGD, cu_seqlens, cu_seqlens, longest, longest, causal=True)
        o: Tensor = out[0] if isinstance(out, tuple) else out  # some versions of FlashAttention-3 return the log-sum-exp too
        return o

    return attend


def _transformer_engine(heads: int, key_value_heads: int, head_size: int) -> Attend:
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        heads, head_size, num_gqa_groups=key_value_heads, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding_causal"
    )

    def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
        longest = longest_document(bounds)
        o: Tensor = module(
            q_THD, k_TGD, v_TGD, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        return o.view(q_THD.shape)  # it comes as [T, H * D]

    return attend
