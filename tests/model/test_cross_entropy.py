"""Head and cross-entropy in chunks, against torch's on full logits."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minimax_train.kernels import cross_entropy
from minimax_train.kernels.cross_entropy import Part, define, define_gradient, linear_cross_entropy
from parallel.collectives import Channel
from parallel.testing import run_ranks
from parallel.world import Place, joined, meet


@pytest.mark.parametrize("tokens", [1, 1023, 1024, 1025, 2500])
def test_losses_and_gradients(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 24, generator=g, requires_grad=True)
    w = torch.randn(70, 24, generator=g, requires_grad=True)
    labels = torch.randint(0, 70, (tokens,), generator=g)
    labels[:: 3 if tokens > 1 else 5_000] = -100 if tokens > 1 else labels[0]
    upstream = torch.rand(tokens, generator=g)
    ours = linear_cross_entropy(x, w, labels)
    ours_grads = torch.autograd.grad((ours * upstream).sum(), (x, w))
    theirs = F.cross_entropy(x @ w.T, labels, reduction="none")
    theirs_grads = torch.autograd.grad((theirs * upstream).sum(), (x, w))
    assert torch.allclose(ours, theirs, atol=1e-6)
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm() + 1e-8


def test_fp64_gradients_numerically(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 3)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, dtype=torch.float64, generator=g, requires_grad=True)
    w = torch.randn(5, 4, dtype=torch.float64, generator=g, requires_grad=True)
    labels = torch.tensor([0, 4, -100, 2, 1, -100, 3])
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, labels), (x, w))


def test_full_logits_never_exist() -> None:
    """No tensor as large as tokens x vocabulary is made, forward or backward."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    x, w = torch.randn(8192, 16, requires_grad=True), torch.randn(500, 16, requires_grad=True)
    with Watch():
        linear_cross_entropy(x, w, torch.zeros(8192, dtype=torch.long)).sum().backward()
    assert 0 < largest <= 1024 * 500


def test_fp32_head_multiplies_bf16_exactly() -> None:
    """With fp32=True a bf16 head differs from the fp32 product of the same numbers by nothing; without, by bf16 rounding."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 64, generator=g).bfloat16(), torch.randn(90, 64, generator=g).bfloat16()
    labels = torch.randint(0, 90, (40,), generator=g)
    truth = F.cross_entropy(x.float() @ w.float().T, labels, reduction="none")
    assert torch.allclose(linear_cross_entropy(x, w, labels, fp32=True), truth, atol=1e-5)
    assert not torch.allclose(linear_cross_entropy(x, w, labels), truth, atol=1e-5)


def part_of_vocabulary(place: Place, x: Tensor, w: Tensor, labels: Tensor, upstream: Tensor) -> list[Tensor]:
    """(losses, this rank's gradient of x, of its rows of w)."""
    with joined(place, "gloo", meet(place)):
        assert dist.group.WORLD is not None
        channel = Channel(dist.group.WORLD)
        part = Part(rank=place.rank, ranks=place.size, gather=lambda t: channel.begin_all_gather(t, "losses").finish())
        inputs = [x.clone().requires_grad_(), w.chunk(place.size)[place.rank].clone().requires_grad_()]
        losses = linear_cross_entropy(*inputs, labels, part=part)
        return [losses.detach(), *torch.autograd.grad(losses, inputs, upstream)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-14)])
def test_vocabulary_of_four_ranks(dtype: torch.dtype, tolerance: float) -> None:
    """More than a chunk of tokens; labels on every rank's first and last row; logits so large that exp of them overflows."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(1100, 24, generator=g).to(dtype), (30 * torch.randn(72, 24, generator=g)).to(dtype)
    labels, upstream = torch.randint(0, 72, (1100,), generator=g), torch.rand(1100, generator=g).to(dtype)
    labels[:8], labels[8::5] = torch.tensor([0, 17, 18, 35, 36, 53, 54, 71]), -100
    exact = [x.double().requires_grad_(), w.double().requires_grad_()]
    truth = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none")
    theirs = [truth, *torch.autograd.grad(truth, exact, upstream.double())]
    parts = run_ranks(4, part_of_vocabulary, x, w, labels, upstream)
    assert all(torch.equal(part[0], parts[0][0]) for part in parts)
    ours = [parts[0][0], torch.stack([part[1] for part in parts]).sum(0), torch.cat([part[2] for part in parts])]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


def test_a_small_loss_of_large_logits_keeps_its_digits() -> None:
    """The label's part holds nearly all of the sum: the whole's loss must not be a difference of two large numbers."""
    logits = torch.tensor([[1000.0, 990.0, 995.0, 0.0]])
    labels = torch.tensor([0])
    both = [define(half, Part(rank=r, ranks=2).local(labels, 2)) for r, half in enumerate(logits.double().split(2, 1))]
    stacked = torch.stack([torch.stack(one) for one in both]).float()  # as the Triton kernel has them
    loss, normaliser = Part(ranks=2, gather=lambda _: stacked).combine(*stacked[0], labels, 2)
    truth = F.cross_entropy(logits.double(), labels)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-4)
    assert normaliser.item() == pytest.approx(logits.double().logsumexp(1).item())


def test_labels_elsewhere() -> None:
    """-200: no loss here, and the gradient of a row without a label; a label that no part has is still seen."""
    logits, labels, scale = torch.randn(2, 5, dtype=torch.float64), torch.tensor([-200, -100]), torch.tensor([0.5, 2.0]).double()
    losses, normaliser = define(logits, labels)
    assert losses.tolist() == [0, 0]
    gradient = define_gradient(logits, labels, normaliser, scale)
    assert torch.allclose(gradient, torch.stack([0.5 * logits[0].softmax(0), torch.zeros(5).double()]))
    for label in (10, -1, -200):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            define(logits[:1], Part(rank=0, ranks=2).local(torch.tensor([label]), 5))
