"""The memory-bound neighbours in Triton against their definitions in fp64: compiled on a GPU, elsewhere interpreted."""

import pytest
import torch
from torch import Tensor

from minimax_train.kernels import cross_entropy, gated_norm, gated_norm_triton, rotary
from minimax_train.kernels.cross_entropy_triton import cross_entropy as row_losses
from minimax_train.kernels.cross_entropy_triton import cross_entropy_gradient_
from minimax_train.kernels.rotary_triton import Rotary
from minimax_train.model.rope import rotation

pytestmark = pytest.mark.usefixtures("poison")
EPS = 1e-5


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    assert torch.isfinite(a).all()
    assert (a - b).norm() < tolerance * b.norm()


def norm_inputs(rows: int, channels: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x and gate as parts of wider rows, weight, dy."""
    g = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, 2 * channels + 3, generator=g).to(device, dtype)
    weight, dy = torch.rand(channels, generator=g).to(device, dtype), torch.randn(rows, channels, generator=g).to(device, dtype)
    return [wide[:, :channels], wide[:, channels + 3 :], weight, dy]


def norm_truth(x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    exact = [t.detach().double().cpu().requires_grad_() for t in (x, gate, weight)]
    y = gated_norm.define(exact[0], exact[1], exact[2], EPS)
    return [y, *torch.autograd.grad(y, exact, dy.double().cpu())]


@pytest.mark.parametrize(("rows", "channels"), [(1, 48), (7, 96), (600, 64), (33, 1000)])
def test_gated_norm(rows: int, channels: int, device: str) -> None:
    *inputs, dy = norm_inputs(rows, channels, device)
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = gated_norm_triton.gated_rms_norm(*leaves, EPS)
    for a, b in zip([y, *torch.autograd.grad(y, leaves, dy)], norm_truth(*inputs, dy), strict=True):
        close(a, b)


def test_gated_norm_in_bf16(device: str) -> None:
    """No products of matrices: the interpreter's bf16 is right here."""
    *inputs, dy = norm_inputs(9, 64, device, torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = gated_norm_triton.gated_rms_norm(*leaves, EPS)
    for a, b in zip([y, *torch.autograd.grad(y, leaves, dy)], norm_truth(*inputs, dy), strict=True):
        assert a.dtype == torch.bfloat16
        close(a, b, 5e-3)


def test_gated_norm_of_sharded_channels(device: str) -> None:
    """Two shards of the channels; their sums are added as a tensor-parallel group would."""
    x, gate, weight, dy = norm_inputs(11, 96, device)
    truth = norm_truth(x, gate, weight, dy)
    shards = [tuple(t[..., part] for t in (x, gate, weight, dy)) for part in (slice(40), slice(40, None))]
    sums = sum(gated_norm_triton.sum_of_squares(s[0]) for s in shards)
    assert isinstance(sums, Tensor)
    ys = [gated_norm_triton.normalise(x, g, w, sums, 96, EPS)[0] for x, g, w, _ in shards]
    close(torch.cat(ys, 1), truth[0])
    dots = sum(gated_norm_triton.row_dot(x, g, w, d, sums, 96, EPS) for x, g, w, d in shards)
    assert isinstance(dots, Tensor)
    grads = [gated_norm_triton.gradients(x, g, w, d, sums, dots, 96, EPS) for x, g, w, d in shards]
    for i, axis in enumerate((1, 1, 0)):
        close(torch.cat([g[i] for g in grads], axis), truth[1 + i])


@pytest.mark.parametrize(("heads", "size", "rotary_dim"), [(1, 64, 64), (3, 128, 64), (11, 48, 24)])
def test_rotary(heads: int, size: int, rotary_dim: int, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    wide, dy = torch.randn(2, 13, heads, 2 * size, generator=g).to(device)
    x, dy = wide[..., :size].requires_grad_(), dy[..., size:]
    cos, sin = rotation(torch.arange(100, 113, device=device), rotary_dim, 1e4)
    exact = x.detach().double().cpu().requires_grad_()
    y, truth = Rotary.apply(x, cos, sin), rotary.define(exact, cos.double().cpu(), sin.double().cpu())
    close(y, truth, 1e-6)
    close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(truth, exact, dy.double().cpu())[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_rows(dtype: torch.dtype, device: str) -> None:
    """More columns than a block, not a multiple of it; an ignored label; large logits; rows of a wider tensor."""
    g = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(5, 9007, generator=g)).to(device, dtype)[:, :9001]
    labels, scale = torch.tensor([3, -100, 9000, 4096, 0], device=device), torch.rand(5, generator=g).to(device)
    exact = logits.double().cpu()
    truth, normaliser = cross_entropy.define(exact, labels.cpu())
    loss, ours = row_losses(logits, labels)
    close(loss, truth)
    close(ours, normaliser)
    gradient = cross_entropy.define_gradient(exact, labels.cpu(), normaliser, scale.double().cpu())
    close(cross_entropy_gradient_(logits.clone(), labels, ours, scale), gradient, 1e-5 if dtype == torch.float32 else 5e-3)


def test_linear_cross_entropy_with_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA device runs it: chunks, and gradients of both factors."""
    rows = cross_entropy._Rows(forward=row_losses, backward=cross_entropy_gradient_)
    monkeypatch.setattr(cross_entropy, "_rows", lambda w: rows if w.dtype == torch.float32 else plain)
    plain = cross_entropy._Rows(forward=cross_entropy.define, backward=cross_entropy.define_gradient)
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(10, 24, generator=g), torch.randn(77, 24, generator=g)
    labels, upstream = torch.randint(0, 77, (10,), generator=g), torch.rand(10, generator=g)
    labels[3] = -100
    outcomes = []
    for where, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        leaves = [t.to(where, dtype).requires_grad_() for t in (x, w)]
        loss = cross_entropy.linear_cross_entropy(*leaves, labels.to(where))
        outcomes.append([loss, *torch.autograd.grad(loss, leaves, upstream.to(where, dtype))])
    for a, b in zip(*outcomes, strict=True):
        close(a, b)
