"""Softmax attention over packed rows: sdpa against the formula in fp64, what a GPU has against sdpa, and who is chosen."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from minimax_train.kernels import softmax_attention
from minimax_train.kernels.choice import Backends, best_backends
from minimax_train.kernels.softmax_attention import best_softmax_backend, causal_attention

LENGTHS = [37, 1, 90]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v where key <= query in one document, without any library's attention."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(q))
    seen = (document[:, None] == document) & (place[:, None] >= place)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def results(attend: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), h, 64, generator=g).to(device, dtype).requires_grad_() for h in (4, 2, 2))
    do = torch.randn(sum(LENGTHS), 4, 64, generator=g).to(device, dtype)
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    o = attend(q, k, v) if attend is formula else attend(q, k, v, cu_seqlens, bounds)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def make(backend: str) -> Any:
    return causal_attention(backend, heads=4, key_value_heads=2, head_size=64)


def test_sdpa_against_the_formula() -> None:
    for a, b in zip(results(make("sdpa"), torch.float64, "cpu"), results(formula, torch.float64, "cpu"), strict=True):
        assert (a - b).norm() < 1e-12 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("backend", ["varlen", "te", "flash"])
def test_on_a_gpu(backend: str) -> None:
    if not softmax_attention._installed(backend):
        pytest.skip(f"{backend} is not installed")
    for a, b in zip(results(make(backend), torch.bfloat16, "cuda"), results(formula, torch.float64, "cpu"), strict=True):
        assert (a.cpu().double() - b).norm() < 1e-2 * b.norm()


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """By device, dtype and what is installed."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    found: set[str] = set()
    real = importlib.util.find_spec
    packages = ("flash_attn", "flash_attn_interface", "transformer_engine", "torch.nn.attention.varlen", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (name in found or None) if name in packages else real(name))
    assert best_backends(cuda, torch.bfloat16, 128) == Backends(lightning="definition", softmax="sdpa")
    with pytest.raises(ValueError, match="'flash' is not installed here; choose one of sdpa"):
        make("flash")
    for package, backend in (("torch.nn.attention.varlen", "varlen"), ("transformer_engine", "te"), ("flash_attn", "flash")):
        found.add(package)
        assert best_softmax_backend(cuda, torch.bfloat16) == backend
    found.add("triton")
    assert best_backends(cuda, torch.float32, 64) == Backends(lightning="triton", softmax="sdpa")
    assert best_backends(cpu, torch.bfloat16, 128) == Backends(lightning="cpu", softmax="sdpa")


def test_unknown() -> None:
    with pytest.raises(ValueError, match="'magic' is unknown; choose one of sdpa"):
        make("magic")
