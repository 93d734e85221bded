"""The router's capacity and balancing against plain definitions, on one rank."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.model.experts import Experts
from minimax_train.model.router import most_probable
from minimax_train.model.router_options import RouterOptions
from minimax_train.model.swiglu import SwiGLU
from tests.support import little_model

EXPERTS = 6


def layer(joined: Session, capacity: float | None) -> Experts:
    built = bare(build_stage(little_model(num_experts=EXPERTS), joined, seed=2, router=RouterOptions(capacity=capacity)))
    experts = built.blocks["0"].experts
    assert isinstance(experts, Experts)
    return experts


def taken(probability: Sequence[Sequence[float]], expert: Sequence[Sequence[int]], limit: int) -> list[list[bool]]:
    """Brute force: each expert sorts all that want it by falling probability, then by rising token, and takes the first `limit`."""
    kept = [[False] * len(row) for row in expert]
    for e in {e for row in expert for e in row}:
        wanting = [(-probability[t][k], t, k) for t, row in enumerate(expert) for k, wanted in enumerate(row) if wanted == e]
        for _, t, k in sorted(wanting)[:limit]:
            kept[t][k] = True
    return kept


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]], int]:
    """Tokens that choose k different experts with probabilities from a handful of values, so that many are equal; and a limit."""
    experts = draw(st.integers(1, 6))
    k = draw(st.integers(1, min(experts, 3)))
    size = draw(st.integers(1, 30))
    crowded = draw(st.booleans())  # all tokens choose the same experts
    first = list(range(k))
    expert = [first if crowded else draw(st.permutations(range(experts)))[:k] for _ in range(size)]
    values = st.sampled_from([0.0, 0.25, 0.5, 0.50000006, 1.0])
    probability = [[draw(values) for _ in range(k)] for _ in range(size)]
    return probability, expert, draw(st.integers(1, size + 1))


@settings(max_examples=300, deadline=None)
@given(choices())
def test_each_expert_takes_its_most_probable(case: tuple[list[list[float]], list[list[int]], int]) -> None:
    probability, expert, limit = case
    assert most_probable(torch.tensor(probability), torch.tensor(expert), limit).tolist() == taken(probability, expert, limit)


@pytest.mark.parametrize(
    ("capacity", "choices", "experts", "limit"),
    [(1.0, 12, 6, 2), (1.0, 13, 6, 3), (1.1, 420, 6, 77), (1.25, 64, 32, 3), (2.0, 10, 5, 4), (None, 10, 5, None)],
)
def test_limit_is_the_exact_ceiling(capacity: float | None, choices: int, experts: int, limit: int | None) -> None:
    """1.1 * 420 / 6 is 77.00000000000001 in floating point."""
    assert RouterOptions(capacity=capacity).limit(choices, experts) == limit


@pytest.mark.parametrize("capacity", [0.0, -1.0, 0.99, math.nan, math.inf])
def test_senseless_capacities_are_refused(capacity: float) -> None:
    with pytest.raises(ValueError, match=r"router.capacity is .*: use a finite number from 1 on, or null"):
        RouterOptions(capacity=capacity)


def masked(experts: Experts, x: torch.Tensor, limit: int) -> torch.Tensor:
    """Every expert on every token, weighted by the renormalised top-2 probabilities where the brute force says the choice is taken."""
    p = F.linear(x, experts.router.weight).softmax(-1)
    top = p.topk(2, dim=-1)
    mask = torch.tensor(taken(top.values.tolist(), top.indices.tolist(), limit))
    weight = torch.zeros_like(p).scatter(1, top.indices, mask * top.values / top.values.sum(-1, keepdim=True))
    ffn = experts.gate_up.shape[1] // 2
    y = [F.linear(F.silu(F.linear(x, w[:ffn])) * F.linear(x, w[ffn:]), d) for w, d in zip(experts.gate_up, experts.down, strict=True)]
    return sum(weight[:, e, None] * y[e] for e in range(len(y)))  # type: ignore[return-value]


@pytest.mark.parametrize("crowded", [False, True], ids=["random", "all tokens to two experts"])
@pytest.mark.parametrize(("tokens", "capacity"), [(1, 1.0), (33, 1.0), (200, 1.0), (200, 1.25)])
def test_outputs_and_gradients(alone: Session, tokens: int, capacity: float, crowded: bool) -> None:
    experts = layer(alone, capacity)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    x = torch.cat([x[: tokens // 2], x[: tokens - tokens // 2]])  # every probability twice
    if crowded:
        x = x.abs()
        with torch.no_grad():
            experts.router.weight[1], experts.router.weight[4] = 2.0, 1.0
    x.requires_grad_()
    inputs, limit = (x, experts.router.weight, experts.gate_up, experts.down), math.ceil(capacity * 2 * tokens / EXPERTS)
    (ours, routing), theirs = experts(x), masked(experts, x, limit)
    if crowded:
        assert routing.here.tolist() == [0, min(limit, tokens), 0, 0, min(limit, tokens), 0]
        assert routing.tokens_per_expert.tolist() == [0, tokens, 0, 0, tokens, 0]
    assert routing.here.sum() == routing.sums[-2] == routing.tokens_per_expert.clamp(max=limit).sum()
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    for a, b in zip(torch.autograd.grad(ours.square().sum(), inputs), torch.autograd.grad(theirs.square().sum(), inputs), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_dropped_choices_are_not_computed(alone: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, seen = layer(alone, 1.0), []
    outputs = SwiGLU.outputs

    def counted(own: SwiGLU, rows: torch.Tensor, *others: Any) -> Any:
        seen.append(len(rows))
        return outputs(own, rows, *others)

    monkeypatch.setattr(SwiGLU, "outputs", counted)
    x = torch.ones(60, 32)  # all tokens alike: two experts take 20 choices each, of the first tokens
    y, routing = experts(x)
    assert seen == [40]
    assert sorted(routing.here.tolist()) == [0, 0, 0, 0, 20, 20]
    assert y[:20].abs().min() > 0
    assert y[20:].abs().max() == 0
    weight, expert, _ = experts.router(x)
    assert (expert[20:] == EXPERTS).all()
    assert weight[20:].abs().max() == 0


def test_equal_probabilities_go_by_the_place_in_the_row(alone: Session) -> None:
    experts = layer(alone, 1.0)
    backwards = torch.arange(60).flip(0)
    y, _ = experts(torch.ones(60, 32), backwards)
    assert y[40:].abs().min() > 0
    assert y[:40].abs().max() == 0


def test_capacity_that_drops_nothing_is_dropless_to_the_bit(alone: Session) -> None:
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for capacity in (None, 3.0):  # 6 experts, 2 choices: at 3 an expert has room for every token
        experts = layer(alone, capacity)
        y, routing = experts(x)
        (y.square().sum() + routing.auxiliary_loss).backward()
        results.append([y, routing.auxiliary_loss, routing.here, routing.sums, *(p.grad for p in experts.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_dropped_in_evaluation(alone: Session) -> None:
    x = torch.ones(60, 32)
    with torch.no_grad():
        y = layer(alone, 1.0).eval()(x)[0]
        assert torch.equal(y, layer(alone, None)(x)[0])


def test_sums_are_counts_and_entropies(alone: Session) -> None:
    experts = layer(alone, 1.0)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)) * 3
    _, _, routing = experts.router(x)
    p = F.linear(x, experts.router.weight).softmax(-1).double()
    wanted = torch.bincount(p.topk(2).indices.flatten(), minlength=EXPERTS)
    assert routing.sums[:EXPERTS].tolist() == wanted.tolist()
    assert routing.sums[EXPERTS] == wanted.clamp(max=17).sum() < 100
    assert routing.sums[-1].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-6)
    with torch.no_grad():
        experts.router.weight.zero_()
    assert experts.router(x)[2].sums[-1].item() == pytest.approx(50 * math.log(EXPERTS), rel=1e-6)
