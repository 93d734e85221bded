"""Softmax attention over packed rows: sdpa against the equation in fp64, what a GPU has against the same, and who is chosen."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from minimax_train.kernels.choice import Backends, best_backends
from minimax_train.kernels.softmax_attention import BACKENDS, Attend, best_softmax_backend, causal_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [37, 1, 90]
HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 4, 2, 64
Installed = Callable[..., None]


def equation(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v where key <= query in one document, without any library's attention."""
    place = torch.arange(len(q))
    document = torch.bucketize(place, torch.tensor(bounds[1:]), right=True)
    seen = (document[:, None] == document) & (place[:, None] >= place)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def results(attend: Attend, dtype: torch.dtype, device: torch.device, lengths: list[int] = LENGTHS) -> list[Tensor]:
    """o and the gradients of q, k, v; inputs are the same numbers, all of them bf16, in every dtype."""
    g = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, HEAD_SIZE) for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS, HEADS)]
    q, k, v, do = (torch.randn(shape, generator=g).bfloat16().to(device, dtype) for shape in shapes)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    o = attend(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), torch.tensor(bounds, dtype=torch.int32, device=device), bounds)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def make(backend: str, device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16, head_size: int = HEAD_SIZE) -> Attend:
    return causal_attention(backend, heads=HEADS, key_value_heads=KEY_VALUE_HEADS, head_size=head_size, device=device, dtype=dtype)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Makes a GPU of a capability appear, and of the optional modules exactly those named be found."""
    optional = ("flash_attn", "flash_attn_interface", "transformer_engine", "torch.nn.attention.varlen", "triton")
    real = importlib.util.find_spec

    def install(*names: str, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: (name in names or None) if name in optional else real(name))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return install


@pytest.mark.parametrize("lengths", [LENGTHS, [128], [0, 5, 0, 0, 3, 0]])
def test_sdpa_against_the_equation(lengths: list[int]) -> None:
    """Several documents, one, and empty ones."""
    ours, exact = (results(f, torch.float64, CPU, lengths) for f in (make("sdpa"), equation))
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() < 1e-12 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(backend: str) -> None:
    """bf16 against the equation in fp64 on the same numbers, within 1%; bf16 sdpa on a CPU is within 0.4%."""
    try:
        attend = make(backend, CUDA)
    except ValueError as hindrance:
        pytest.skip(str(hindrance))
    for a, b in zip(results(attend, torch.bfloat16, CUDA), results(equation, torch.float64, CPU), strict=True):
        assert (a.cpu().double() - b).norm() < 1e-2 * b.norm()


class Standin:
    """What the libraries document, by the equation in whatever dtype: how our calls read their signatures, not what their kernels do."""

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: tuple[int, int]) -> Tensor:
        assert cu_seqlens.dtype == torch.int32
        assert longest == (max(LENGTHS), max(LENGTHS))
        return equation(q, k, v, cu_seqlens, cu_seqlens.tolist())

    @staticmethod
    def varlen_2_11(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0)
        assert query.shape == key.shape, "2.11 says nothing of grouped queries"
        return Standin.of(query, key, value, cu_seq_q, (max_q, max_k))

    @staticmethod
    def varlen_2_13(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int,
        *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
        seqused_k: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0)
        assert enable_gqa
        return Standin.of(query, key, value, cu_seq_q, (max_q, max_k))

    @staticmethod
    def flash_2(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert causal
        return Standin.of(q, k, v, cu_seqlens_q, (max_seqlen_q, max_seqlen_k))

    @staticmethod
    def flash_3(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert causal
        return Standin.of(q, k, v, cu_seqlens_q, (max_seqlen_q, max_seqlen_k)), None

    class DotProductAttention(torch.nn.Module):
        def __init__(
            self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None, attention_dropout: float = 0.1,
            qkv_format: str = "sbhd", attn_mask_type: str = "causal",
        ) -> None:  # fmt: skip
            super().__init__()
            assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "thd", "padding_causal")
            self.shape = num_attention_heads, num_gqa_groups, kv_channels

        def forward(
            self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: Tensor | None = None, *,
            cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, max_seqlen_q: int, max_seqlen_kv: int,
        ) -> Tensor:  # fmt: skip
            assert self.shape == (query_layer.shape[1], key_layer.shape[1], query_layer.shape[2])
            return Standin.of(query_layer, key_layer, value_layer, cu_seqlens_q, (max_seqlen_q, max_seqlen_kv)).flatten(1)


@pytest.mark.parametrize(
    ("backend", "module", "name", "standin"),
    [
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", Standin.varlen_2_11),
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", Standin.varlen_2_13),
        ("flash", "flash_attn", "flash_attn_varlen_func", Standin.flash_2),
        ("flash", "flash_attn_interface", "flash_attn_varlen_func", Standin.flash_3),
        ("te", "transformer_engine.pytorch", "DotProductAttention", Standin.DotProductAttention),
    ],
)
def test_calls_by_the_book(
    backend: str, module: str, name: str, standin: Any, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our side of each call: arguments, grouping, the longest document, the result's shape."""
    fake = ModuleType(module)
    setattr(fake, name, standin)
    monkeypatch.setitem(sys.modules, module, fake)
    if backend == "te":
        monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    installed(module.removesuffix(".pytorch"))
    for a, b in zip(results(make(backend, CUDA), torch.float64, CPU), results(equation, torch.float64, CPU), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() < 1e-12 * b.norm()


def test_choice(installed: Installed) -> None:
    """By device, dtype, head size, generation of the GPU, and what is installed."""
    installed()
    assert best_backends(CUDA, torch.bfloat16, 128) == Backends(lightning="definition", softmax="sdpa", experts="grouped")
    assert best_backends(CUDA, torch.bfloat16, 128, (64, 12)).experts == "loop"
    everything = ("torch.nn.attention.varlen", "transformer_engine", "flash_attn", "flash_attn_interface", "triton")
    for count, backend in ((1, "varlen"), (2, "te"), (3, "flash")):
        installed(*everything[:count])
        assert [best_softmax_backend(CUDA, dtype, 128) for dtype in (torch.bfloat16, torch.float16)] == [backend] * 2
    installed(*everything[:2])
    assert best_softmax_backend(CUDA, torch.bfloat16, 256) == "varlen"
    installed(*everything[:2], capability=(8, 0))
    assert best_softmax_backend(CUDA, torch.bfloat16, 128) == "varlen"
    installed("flash_attn_interface", capability=(10, 0))
    assert best_softmax_backend(CUDA, torch.bfloat16, 128) == "sdpa", "FlashAttention-3 is Hopper's"
    installed(*everything, capability=(7, 5))
    assert best_softmax_backend(CUDA, torch.float16, 128) == "sdpa"
    installed(*everything)
    assert [best_softmax_backend(CUDA, torch.bfloat16, size) for size in (256, 264, 12)] == ["flash", "sdpa", "sdpa"]
    assert best_backends(CUDA, torch.float32, 64) == Backends(lightning="triton", softmax="sdpa")
    assert best_backends(CPU, torch.bfloat16, 128) == Backends(lightning="cpu", softmax="sdpa")


def test_refusals(installed: Installed) -> None:
    """One line: what was asked, why not, what there is."""
    installed("flash_attn")

    def refused(words: str, *asked: Any) -> None:
        with pytest.raises(ValueError, match=words) as refusal:
            make(*asked)
        assert "\n" not in str(refusal.value)

    refused("'magic' is unknown; choose one of flash, te, varlen, sdpa", "magic")
    refused("'te' is not installed here; choose one of flash, sdpa", "te", CUDA)
    refused("'flash' takes bfloat16 or float16 on a GPU, not torch.bfloat16 on cpu; choose one of sdpa", "flash")
    refused("'flash' takes bfloat16 or float16 on a GPU, not torch.float32 on cuda; choose one of sdpa", "flash", CUDA, torch.float32)
    refused("multiple of 8 up to 256, not 320; choose one of sdpa", "flash", CUDA, torch.bfloat16, 320)
    installed("flash_attn", capability=(7, 5))
    refused("'flash' needs a GPU of compute capability 8.0 or later; choose one of sdpa", "flash", CUDA)
