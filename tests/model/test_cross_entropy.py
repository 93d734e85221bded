"""Head and cross-entropy in chunks, against torch's on full logits."""

import pytest
import torch
import torch.nn.functional as F

from minimax_train.kernels import cross_entropy
from minimax_train.kernels.cross_entropy import linear_cross_entropy


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
