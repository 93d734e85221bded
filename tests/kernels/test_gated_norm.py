"""RMSNorm times sigmoid gate against its definition."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minimax_train.kernels.gated_norm import define, gated_rms_norm
from parallel.collectives import all_sum
from parallel.testing import run_ranks
from parallel.world import Place, joined, meet


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


def sharded_norm(place: Place, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """(y, dx, dgate, dweight) of this rank's channels."""
    with joined(place, "gloo", meet(place)):
        assert dist.group.WORLD is not None
        share = [t.chunk(place.size, -1)[place.rank] for t in (*tensors, dy)]
        inputs = [t.clone().requires_grad_() for t in share[:3]]
        y = gated_rms_norm(*inputs, 0.01, total=partial(all_sum, group=dist.group.WORLD), channels=tensors[0].shape[1])
        return [y.detach(), *torch.autograd.grad(y, inputs, share[3])]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_channels_of_four_ranks(dtype: torch.dtype, tolerance: float) -> None:
    """Two blocks of rows and a part of one; channels of quite different size on each rank."""
    g = torch.Generator().manual_seed(0)
    x, gate, dy = (torch.randn(600, 48, generator=g, dtype=torch.float64) for _ in range(3))
    x = x * torch.arange(1, 49)
    tensors, dy = [t.to(dtype) for t in (x, gate, torch.rand(48, generator=g))], dy.to(dtype)
    exact = [t.double().requires_grad_() for t in tensors]
    truth = define(*exact, 0.01)
    theirs = [truth, *torch.autograd.grad(truth, exact, dy.double())]
    shards = run_ranks(4, sharded_norm, tensors, dy)
    for i, b in enumerate(theirs):
        a = torch.cat([shard[i] for shard in shards], -1)
        assert a.dtype == dtype
        assert (a.double() - b).norm() < tolerance * b.norm()
