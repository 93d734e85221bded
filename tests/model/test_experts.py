"""Router and experts against their plain definition."""

import pytest
import torch
import torch.nn.functional as F

from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.model.experts import Experts
from tests.support import little_model


@pytest.fixture
def experts(alone: Session) -> Experts:
    layer = bare(build_stage(little_model(num_experts=6), alone, seed=2)).blocks["0"].experts
    assert isinstance(layer, Experts)
    return layer


def dense(layer: Experts, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, weighted by the renormalised top-2 probabilities: equation by equation."""
    p = (x @ layer.router.weight.T).softmax(-1)
    top = p.topk(2, dim=-1)
    weight = torch.zeros_like(p).scatter(1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    ffn = layer.gate_up.shape[1] // 2
    y = [F.linear(F.silu(F.linear(x, w[:ffn])) * F.linear(x, w[ffn:]), d) for w, d in zip(layer.gate_up, layer.down, strict=True)]
    return sum(weight[:, e, None] * y[e] for e in range(len(y)))  # type: ignore[return-value]


@pytest.mark.parametrize("tokens", [1, 2, 33, 200])
def test_outputs_and_gradients(experts: Experts, tokens: int) -> None:
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens), requires_grad=True)
    inputs = (x, experts.router.weight, experts.gate_up, experts.down)
    ours, theirs = experts(x)[0], dense(experts, x)
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    for a, b in zip(torch.autograd.grad(ours.square().sum(), inputs), torch.autograd.grad(theirs.square().sum(), inputs), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm() + 1e-9


def test_all_tokens_to_two_experts(experts: Experts) -> None:
    """The others' gradients are true zeros, present and finite."""
    with torch.no_grad():
        experts.router.weight.zero_()
        experts.router.weight[1, 0], experts.router.weight[4, 0] = 50.0, 40.0
    x = torch.randn(20, 32).abs().requires_grad_()
    y, routing = experts(x)
    y.sum().backward()
    assert routing.tokens_per_expert.tolist() == [0, 20, 0, 0, 20, 0]
    assert experts.gate_up.grad is not None
    assert experts.gate_up.grad[[0, 2, 3, 5]].abs().max() == 0
    assert experts.gate_up.grad[1].abs().max() > 0


def test_auxiliary_loss_is_one_at_balance_and_grows(experts: Experts) -> None:
    with torch.no_grad():
        experts.router.weight.copy_(torch.eye(6, 32) * 20)
        balanced = torch.cat([torch.eye(6, 32), torch.eye(6, 32).roll(1, 0)]) + torch.eye(6, 32).roll(1, 0).repeat(2, 1) * 0.5
        lopsided = torch.eye(6, 32)[[0] * 12] + torch.eye(6, 32)[[1] * 12] * 0.5
        assert experts(balanced)[1].auxiliary_loss.item() == pytest.approx(1.0, abs=1e-5)
        assert experts(lopsided)[1].auxiliary_loss.item() == pytest.approx(3.0, abs=0.1)  # f = 1/2 on the expert that has m = 1


def test_bf16_model_keeps_routers_and_slopes_in_fp32(alone: Session) -> None:
    decoder = bare(build_stage(little_model(), alone, dtype="bf16"))
    kinds = {name: p.dtype for name, p in decoder.named_parameters()}
    assert {n for n, d in kinds.items() if d == torch.float32} == {f"blocks.{i}.experts.router.weight" for i in range(4)}
    decoder.to(torch.bfloat16)  # what Float16Module does to every parameter and buffer
    assert all(b.attention.slopes.dtype == torch.float32 for b in decoder.blocks.values() if hasattr(b.attention, "slopes"))
    assert not list(decoder.named_buffers())
