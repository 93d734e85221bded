"""Linear maps of groups of rows: the grouped products against the definition, and the choice between them."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from minimax_train.kernels.grouped_linear import (
    ROWS,
    Bounds,
    grouped_backend,
    grouped_linear,
    grouped_linear_input_gradient,
    grouped_linear_weight_gradient,
    rows_multiple,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def results(backend: str, counts: list[int], device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(sum(counts), size, generator=generator).to(device, dtype) for size in (16, 24))
    weight = torch.randn(len(counts), 24, 16, generator=generator).to(device, dtype)
    bounds = Bounds(counts, x.device, backend)
    made = (
        grouped_linear(x, weight, bounds),
        grouped_linear_input_gradient(dy, weight, bounds),
        grouped_linear_weight_gradient(dy, x, bounds),
    )
    return tuple(t.double().cpu() for t in made)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [[8, 24, 8], [0, 16, 0], [40]])
def test_grouped_equals_the_loop(device: str, counts: list[int]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    counts = [max(count, ROWS) for count in counts] if device == "cuda" else counts
    for a, b in zip(results("grouped", counts, device, dtype), results("loop", counts, device, dtype), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= (1e-2 if device == "cuda" else 1e-6) * b.norm()


def test_loop_is_the_equation() -> None:
    counts = [3, 0, 5]
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(8, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 24, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    expert = torch.tensor([0] * 3 + [2] * 5)
    y = torch.einsum("ri,roi->ro", x, weight[expert])
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    x, weight = x.detach(), weight.detach()
    bounds = Bounds(counts, x.device, "loop")
    for ours, theirs in (
        (grouped_linear(x, weight, bounds), y),
        (grouped_linear_input_gradient(dy, weight, bounds), dx),
        (grouped_linear_weight_gradient(dy, x, bounds), dweight),
    ):
        assert (ours - theirs).norm() < 1e-13 * theirs.norm()
    assert grouped_linear_weight_gradient(dy, x, bounds)[1].abs().max() == 0, "no rows: zeros"


def standin(
    A: list[Tensor], B: list[Tensor], out: list[Tensor], out_dtype: torch.dtype, layout: str, m_splits: list[int] | None, grad: bool,
    single_output: bool,
) -> None:  # fmt: skip
    """What Transformer Engine's products do, by the equation: how our calls read its signature, not what its kernels do."""
    assert all(t.is_contiguous() and t.dtype == out_dtype for t in (*A, *B, *out))
    assert (grad, single_output) == (layout != "TN", layout != "NT")
    assert m_splits == [len(rows) for rows in B]
    outs = out[0].split(m_splits) if single_output else out
    for a, b, o in zip(A, B, outs, strict=True):
        if len(b) > 0:  # a sum over nothing is not written
            o.copy_((b.T if layout[1] == "T" else b) @ (a.T if layout[0] == "T" else a))


def until_2_9(
    A: list[Tensor], B: list[Tensor], out: list[Tensor], out_dtype: torch.dtype, workspaces: list[str], layout: str = "TN",
    m_splits: list[int] | None = None, gelu: bool = False, grad: bool = False, accumulate: bool = False, bias: Any = None,
    use_bias: bool = False, use_split_accumulator: bool = False, D_dtype: Any = None, single_output: bool = False,
) -> None:  # fmt: skip
    assert workspaces == ["a workspace"]
    standin(A, B, out, out_dtype, layout, m_splits, grad, single_output)


def since_2_9(
    A: list[Tensor], B: list[Tensor], out: list[Tensor], quantization_params: list[None], out_dtype: torch.dtype, layout: str = "TN",
    m_splits: list[int] | None = None, gelu: bool = False, grad: bool = False, accumulate: bool = False, bias: Any = None,
    use_bias: bool = False, use_split_accumulator: bool = False, D_dtype: Any = None, single_output: bool = False,
) -> None:  # fmt: skip
    assert quantization_params == [None] * len(A)
    standin(A, B, out, out_dtype, layout, m_splits, grad, single_output)


@pytest.mark.parametrize("version", [until_2_9, since_2_9])
def test_transformer_engine_by_the_book(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {f"transformer_engine{name}": ModuleType("te") for name in ("", ".pytorch", ".pytorch.cpp_extensions", ".pytorch.module")}
    modules["transformer_engine.pytorch.module.base"] = base = ModuleType("te")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["transformer_engine.pytorch.cpp_extensions"].general_grouped_gemm = version  # type: ignore[attr-defined]
    if version is until_2_9:
        base.get_multi_stream_cublas_workspace = lambda: ["a workspace"]  # type: ignore[attr-defined]
    for counts in ([3, 5, 1], [0, 7, 0], [4]):
        for a, b in zip(results("te", counts, "cpu", torch.float32), results("loop", counts, "cpu", torch.float32), strict=True):
            assert a.shape == b.shape
            assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_transformer_engine_on_a_gpu() -> None:
    try:
        backend = grouped_backend("te", torch.device("cuda"), torch.bfloat16, 16, 24)
    except ValueError as hindrance:
        pytest.skip(str(hindrance))
    for counts in ([3, 5, 1], [0, 7, 0], [4]):
        for a, b in zip(results(backend, counts, "cuda", torch.bfloat16), results("loop", counts, "cuda", torch.bfloat16), strict=True):
            assert (a - b).norm() <= 1e-2 * b.norm()


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, bf16, found = torch.device("cuda"), torch.bfloat16, importlib.util.find_spec

    def machine(capability: tuple[int, int], *, te: bool) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: (te or None) if name == "transformer_engine" else found(name))

    for capability, backend in (((9, 0), "grouped"), ((8, 0), "grouped"), ((7, 5), "loop")):
        machine(capability, te=True)
        assert grouped_backend("auto", cuda, bf16, 6144, 9216) == backend
    machine((9, 0), te=True)
    assert grouped_backend("auto", cuda, bf16, 6144, 9212) == "loop"
    assert grouped_backend("auto", cuda, torch.float32, 6144, 9216) == "loop"
    assert grouped_backend("auto", torch.device("cpu"), bf16, 6144, 9216) == "loop"
    assert [grouped_backend(asked, cuda, bf16, 6144, 9216) for asked in ("loop", "grouped", "te")] == ["loop", "grouped", "te"]  # type: ignore[arg-type]
    assert [rows_multiple(backend) for backend in ("loop", "grouped", "te")] == [1, 8, 1]
    with pytest.raises(ValueError, match=r"backend 'triton' of grouped_linear is unknown; choose one of loop, grouped, te"):
        rows_multiple("triton")
    machine((7, 5), te=True)
    with pytest.raises(
        ValueError, match=r"^experts_backend 'te' needs a GPU of compute capability 8.0 or later; choose auto or one of loop$"
    ):
        grouped_backend("te", cuda, bf16, 6144, 9216)
    machine((9, 0), te=False)
    with pytest.raises(ValueError, match=r"^experts_backend 'te' is not installed here; choose auto or one of loop, grouped$"):
        grouped_backend("te", cuda, bf16, 6144, 9216)
    with pytest.raises(ValueError, match=r"^experts_backend 'grouped' takes inputs and outputs in multiples of 8, not 6144, 9212; "):
        grouped_backend("grouped", cuda, bf16, 6144, 9212)
