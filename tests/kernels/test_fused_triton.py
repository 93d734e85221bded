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
EPS = 0.01  # so large that leaving it out is seen


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


def norm_results(inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = gated_norm_triton.gated_rms_norm(*leaves, EPS)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize(("rows", "channels"), [(1, 48), (7, 96), (70, 64), (33, 1000), (2, 8192)])
def test_gated_norm(rows: int, channels: int, device: str) -> None:
    *inputs, dy = norm_inputs(rows, channels, device)
    for a, b in zip(norm_results(inputs, dy), norm_truth(*inputs, dy), strict=True):
        close(a, b)


def test_gated_norm_of_many_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs in the backward and six in the forward, for 33 rows; the weight's gradient is the same bits at every call."""
    monkeypatch.setattr(gated_norm_triton, "WARPS", 12)
    *inputs, dy = norm_inputs(33, 96, device)
    first = norm_results(inputs, dy)
    for a, b in zip(first, norm_truth(*inputs, dy), strict=True):
        close(a, b)
    assert torch.equal(first[3], norm_results(inputs, dy)[3])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 5e-3)])
def test_gated_norm_in_16_bits(dtype: torch.dtype, tolerance: float, device: str) -> None:
    """No products of matrices: the interpreter's bf16 is right here."""
    *inputs, dy = norm_inputs(9, 64, device, dtype)
    for a, b in zip(norm_results(inputs, dy), norm_truth(*inputs, dy), strict=True):
        assert a.dtype == dtype
        close(a, b, tolerance)


def test_gated_norm_of_other_strides(device: str) -> None:
    """Columns apart in every argument, and the gradient of a sum: one number, expanded."""
    x, gate, dy = (t.T.contiguous().T for t in norm_inputs(7, 48, device)[:2] + norm_inputs(7, 48, device)[3:])
    weight = torch.rand(48, 2, generator=torch.Generator().manual_seed(0)).to(device)[:, 0]
    for upstream in (dy, torch.ones((), device=device).expand(7, 48)):
        for a, b in zip(norm_results([x, gate, weight], upstream), norm_truth(x, gate, weight, upstream), strict=True):
            close(a, b)
    close(gated_norm_triton.sum_of_squares(x), x.double().square().sum(1))


def test_gated_norm_of_sharded_channels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards of the channels; their sums are added as a tensor-parallel group would. Three and six programs for 11 rows."""
    monkeypatch.setattr(gated_norm_triton, "WARPS", 12)
    x, gate, weight, dy = norm_inputs(11, 96, device)
    truth = norm_truth(x, gate, weight, dy)
    x, dy = x.T.contiguous().T, dy.T.contiguous().T  # the pieces, too, take any strides
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


def test_gated_norm_takes_totals_where_it_is_differentiated(device: str) -> None:
    """One rank's half of the channels; the other half's sums are added as its group would, first of squares, then of dots."""
    x, gate, weight, dy = norm_inputs(11, 96, device)
    truth = norm_truth(x, gate, weight, dy)
    mine, other = ([t[..., part] for t in (x, gate, weight, dy)] for part in (slice(40), slice(40, None)))
    squares = gated_norm_triton.sum_of_squares(x)
    theirs = iter((gated_norm_triton.sum_of_squares(other[0]), gated_norm_triton.row_dot(*other, squares, 96, EPS)))
    leaves = [t.detach().requires_grad_() for t in mine[:3]]
    y = gated_norm_triton.gated_rms_norm(*leaves, EPS, total=lambda t: t + next(theirs), channels=96)
    for a, b in zip([y, *torch.autograd.grad(y, leaves, mine[3])], truth, strict=True):
        close(a, b[..., :40])


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 5e-3)])
def test_rotary_in_16_bits(dtype: torch.dtype, tolerance: float, device: str) -> None:
    """Heads before tokens in memory; the channels that are not turned keep their bits."""
    x = torch.randn(3, 13, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype).transpose(0, 1)
    cos, sin = rotation(torch.arange(13, device=device), 32, 1e4)
    y = Rotary.apply(x, cos, sin)
    close(y, rotary.define(x.double().cpu(), cos.cpu(), sin.cpu()), tolerance)
    assert torch.equal(y[..., 32:], x[..., 32:])


def test_rotary_of_other_strides(device: str) -> None:
    """Channels apart, and the gradient of a sum: one number, expanded."""
    x = torch.randn(64, 3, 5, generator=torch.Generator().manual_seed(0)).to(device).permute(2, 1, 0).requires_grad_()
    cos, sin = rotation(torch.arange(5, device=device), 32, 1e4)
    y, truth = Rotary.apply(x, cos, sin), rotary.define(x, cos, sin)
    close(y, truth, 1e-6)
    close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(truth.sum(), x)[0], 1e-6)


def test_rotary_refuses_angles_of_other_tokens(device: str) -> None:
    x = torch.zeros(3, 2, 8, device=device)
    cos = torch.ones(2, 1, 2, device=device)
    with pytest.raises(ValueError, match=r"\[tokens, 1, half\]"):
        Rotary.apply(x, cos, cos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_rows(dtype: torch.dtype, device: str) -> None:
    """More columns than a block, not a multiple of it; an ignored label and one elsewhere; large logits; rows of a wider tensor."""
    g = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(6, 9007, generator=g)).to(device, dtype)[:, :9001]
    labels, scale = torch.tensor([3, -100, 9000, 4096, 0, -200], device=device), torch.rand(6, generator=g).to(device)
    exact = logits.double().cpu()
    truth, normaliser = cross_entropy.define(exact, labels.cpu())
    loss, ours = row_losses(logits, labels)
    close(loss, truth)
    close(ours, normaliser)
    gradient = cross_entropy.define_gradient(exact, labels.cpu(), normaliser, scale.double().cpu())
    close(cross_entropy_gradient_(logits.clone(), labels, ours, scale), gradient, 1e-5 if dtype == torch.float32 else 5e-3)


def test_cross_entropy_at_the_edges(device: str) -> None:
    """A block of -inf logits, as of a masked vocabulary; a label outside it is seen in the loss; an ignored row's gradient is zero."""
    logits = torch.randn(3, 9001, generator=torch.Generator().manual_seed(0)).to(device)
    logits[:, :5000] = -torch.inf
    labels, scale = torch.tensor([6000, -100, 9001], device=device), torch.ones(3, device=device)
    loss, normaliser = row_losses(logits, labels)
    close(loss[:1], cross_entropy.define(logits[:1].double().cpu(), labels[:1].cpu())[0])
    assert loss[1] == 0
    assert loss[2].isnan()
    logits[1] = torch.inf
    gradient = cross_entropy_gradient_(logits, labels, normaliser, scale)
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy.define(torch.zeros(1, 4), torch.tensor([-1]))


def test_offsets_beyond_32_bits(device: str) -> None:
    """Rows, and heads, 2^30 numbers apart: the third lies 2^31 behind the first. The memory between is never touched."""
    apart, size, g = 1 << 30, 64, torch.Generator().manual_seed(0)
    memory = torch.empty(0, dtype=torch.float16, device=device).resize_(2 * apart + 4 * size)  # not filled by `poison`
    rows = memory.as_strided((3, size), (apart, 1))
    rows.copy_(torch.randn(3, size, generator=g))
    near, weight, labels = rows.clone(), torch.rand(size, generator=g).to(device), torch.tensor([1, 2, 3], device=device)
    for a, b in zip(norm_results([rows, rows, weight], rows), norm_results([near, near, weight], near), strict=True):
        assert torch.equal(a, b)
    sums, other = (gated_norm_triton.sum_of_squares(x) for x in (rows, near))
    assert torch.equal(sums, other)
    dots = [gated_norm_triton.row_dot(x, x, weight, x, sums, size, EPS) for x in (rows, near)]
    assert torch.equal(*dots)
    heads = memory.as_strided((1, 3, size), (size, apart, 1))
    cos, sin = rotation(torch.arange(1, device=device) + 1, 32, 1e4)
    assert torch.equal(Rotary.apply(heads, cos, sin), Rotary.apply(near[None], cos, sin))
    cos, sin = rotation(torch.arange(3, device=device), 32, 1e4)
    assert torch.equal(Rotary.apply(rows[:, None], cos, sin), Rotary.apply(near[:, None], cos, sin))
    far, close_by = row_losses(rows, labels), row_losses(near, labels)
    assert torch.equal(far[0], close_by[0])
    scale = torch.ones(3, device=device)
    cross_entropy_gradient_(near, labels, far[1], scale)
    assert torch.equal(cross_entropy_gradient_(rows, labels, far[1], scale), near)


@pytest.mark.parametrize("weighted", [True, False])
def test_linear_cross_entropy_with_it(weighted: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA device runs it: chunks, and gradients of both factors; labels that lie apart. The gradient of a sum is expanded."""
    rows = cross_entropy._Rows(forward=row_losses, backward=cross_entropy_gradient_)
    monkeypatch.setattr(cross_entropy, "_rows", lambda w: rows if w.dtype == torch.float32 else plain)
    plain = cross_entropy._Rows(forward=cross_entropy.define, backward=cross_entropy.define_gradient)
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(10, 24, generator=g), torch.randn(77, 24, generator=g)
    labels, weights = torch.randint(0, 77, (10, 2), generator=g)[:, 0], torch.rand(10, generator=g)
    labels[3] = -100
    outcomes = []
    for where, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        leaves = [t.to(where, dtype).requires_grad_() for t in (x, w)]
        loss = cross_entropy.linear_cross_entropy(*leaves, labels.to(where))
        total = (loss * weights.to(where, dtype)).sum() if weighted else loss.sum()
        outcomes.append([loss, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*outcomes, strict=True):
        close(a, b)
