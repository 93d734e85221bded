"""RMSNorm times sigmoid gate against its definition."""

import pytest
import torch

from minimax_train.kernels.gated_norm import define, gated_rms_norm


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 700])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 5e-3)])
def test_against_definition(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    g = torch.Generator().manual_seed(tokens)
    x, gate, dy = (torch.randn(tokens, 48, generator=g).to(dtype) for _ in range(3))
    w = torch.rand(48, generator=g).to(dtype)
    wide = torch.float64
    inputs = [t.clone().requires_grad_() for t in (x, gate, w)]
    exact = [t.to(wide).requires_grad_() for t in (x, gate, w)]
    y, truth = gated_rms_norm(*inputs, 1e-6), define(*exact, 1e-6)
    ours = [y, *torch.autograd.grad(y, inputs, dy)]
    theirs = [truth, *torch.autograd.grad(truth, exact, dy.to(wide))]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert (a.to(wide) - b).norm() < tolerance * b.norm()


def test_gradients_numerically() -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 7), (5, 7), (7,))]
    assert torch.autograd.gradcheck(lambda *a: gated_rms_norm(*a, 1e-6), inputs)
