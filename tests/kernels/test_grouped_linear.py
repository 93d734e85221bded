"""Linear maps of groups of rows: the grouped products against the definition, and the choice between them."""

import pytest
import torch
from torch import Tensor

from minimax_train.kernels.grouped_linear import (
    ROWS,
    Bounds,
    best_grouped_backend,
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


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for capability, backend in (((9, 0), "grouped"), ((8, 0), "grouped"), ((7, 5), "loop")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert best_grouped_backend(cuda, torch.bfloat16, 6144, 9216) == backend
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert best_grouped_backend(cuda, torch.bfloat16, 6144, 9212) == "loop"
    assert best_grouped_backend(cuda, torch.float32, 6144, 9216) == "loop"
    assert best_grouped_backend(torch.device("cpu"), torch.bfloat16, 6144, 9216) == "loop"
    assert (rows_multiple("loop"), rows_multiple("grouped")) == (1, 8)
    with pytest.raises(ValueError, match=r"backend 'triton' of grouped_linear is unknown; choose 'loop' or 'grouped'"):
        rows_multiple("triton")
