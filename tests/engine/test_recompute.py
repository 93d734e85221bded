"""Layers that run again in the backward pass: the same bits, less memory, the same exchanges."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minimax_train.engine.session import Session, session
from minimax_train.engine.tally import Tally
from minimax_train.model.decoder import Decoder
from minimax_train.model.recompute import Recompute, recomputed
from minimax_train.model.router_options import RouterOptions
from minimax_train.model.row import Row
from parallel.collectives import Channel, OnHost
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import hybrid, train_on


@pytest.fixture
def decoder(alone: Session) -> Decoder:
    from minimax_train.engine.stage import bare, build_stage

    return bare(build_stage(hybrid(), alone, seed=3))


def bytes_kept(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns, and the bytes it allocated and did not free: what its backward needs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    return result, sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def losses_gradients_bytes(decoder: Decoder, recompute: Recompute) -> tuple[Tensor, dict[str, Tensor], int]:
    decoder.recompute = recompute
    row = Row.of_documents([torch.arange(100), torch.arange(100, 256)])
    row = row.with_labels((row.tokens + 7) % 300)
    decoder.zero_grad()
    (losses, routings), kept = bytes_kept(lambda: decoder(row))
    (losses.sum() + sum(r.auxiliary_loss for r in routings)).backward()
    return losses, {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}, kept


def test_same_bits_and_less_memory(decoder: Decoder) -> None:
    losses, gradients, kept = losses_gradients_bytes(decoder, "none")
    again, same_gradients, less = losses_gradients_bytes(decoder, "full")
    assert torch.equal(losses, again)
    assert gradients.keys() == same_gradients.keys() == {name for name, _ in decoder.named_parameters()}
    assert all(torch.equal(same_gradients[name], gradient) for name, gradient in gradients.items())
    inputs = 8 * 256 * 32 * 4  # layers x tokens x hidden x fp32: what must stay
    assert inputs < less < 3 * inputs
    assert kept > 10 * less


def test_selective_keeps_the_rows_of_experts_alone(decoder: Decoder) -> None:
    losses, gradients, kept = losses_gradients_bytes(decoder, "none")
    again, same_gradients, less = losses_gradients_bytes(decoder, "selective")
    assert torch.equal(losses, again)
    assert all(torch.equal(same_gradients[name], gradient) for name, gradient in gradients.items())
    gate_and_up = 8 * 256 * 2 * 2 * 24 * 4  # layers x tokens x choices x (gate and up) x width x fp32
    assert kept - less == pytest.approx(gate_and_up, rel=0.02)


def test_the_second_run_is_whole() -> None:
    """What comes after the last tensor that backward needs is done again too: it may be an exchange that another rank waits for."""
    runs: list[str] = []

    def layer(x: Tensor) -> tuple[Tensor, None]:
        y = x.exp()
        runs.append("to the end")
        return y + 1, None

    x = torch.randn(3, requires_grad=True)
    recomputed(layer, x)[0].sum().backward()
    assert runs == ["to the end"] * 2


def test_what_was_sent_is_freed(alone: Session) -> None:
    """A stage that runs its layers again keeps what it got, not what it sent on; the backward pass works without."""
    from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

    from minimax_train.engine.stage import build_stages

    (stage,) = build_stages(hybrid(), alone, (range(2),), seed=3)
    stage.network.recompute = "full"
    row = Row.of_documents([torch.arange(256)]).with_labels(torch.arange(256))

    def forward(*, free: bool) -> Tensor:
        sent: Tensor = stage(row, 0.0, Tally(row))[0]
        assert sent.shape == (256, 1, 32)
        deallocate_output_tensor(sent, free)
        return sent

    sent, kept = bytes_kept(lambda: forward(free=False))
    sent.sum().backward()
    gradients = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.zero_grad()
    freed, less = bytes_kept(lambda: forward(free=True))
    assert kept - less > 0.9 * sent.nbytes
    custom_backward(freed, torch.ones_like(sent))
    assert all(torch.equal(p.grad, gradients[name]) for name, p in stage.named_parameters())


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_the_choice_of_experts_is_kept(alone: Session, capacity: float | None) -> None:
    """A router whose weight is changed before the backward pass chooses, and drops, others; the second run must not."""
    from minimax_train.engine.stage import bare, build_stage

    decoder = bare(build_stage(hybrid(), alone, seed=3, router=RouterOptions(capacity=capacity)))
    row = Row.of_documents([torch.arange(200)])
    row = row.with_labels((row.tokens + 7) % 300)
    chosen: list[list[int]] = []
    handle = decoder.blocks["7"].experts.router.register_forward_hook(lambda m, i, o: chosen.append(o[1].flatten().tolist()))
    decoder.recompute = "full"
    losses, _ = decoder(row)
    with torch.no_grad():
        decoder.blocks["7"].experts.router.weight.neg_()
    losses.sum().backward()
    handle.remove()
    assert len(chosen) == 2
    assert chosen[0] == chosen[1]
    assert (4 in chosen[0]) == (capacity is not None)  # the mark of a dropped choice


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=2, expert=2),
        pytest.param(Layout(pipeline=2, context=2), marks=pytest.mark.slow),
        pytest.param(Layout(tensor=2, context=2, expert=2, expert_tensor=2), marks=pytest.mark.slow),
        pytest.param(Layout(pipeline=2, virtual_pipeline=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=["pipeline experts", "pipeline context", "tensor context experts", "interleaved tensor"],
)
def test_exchanges_run_again_in_order(corpus: Path, layout: Layout) -> None:
    """The same bits; with late exchanges what is taken before it came would be NaN."""
    once, twice = (run_ranks(4, again, corpus, layout, recompute)[3] for recompute in ("none", "full"))
    assert once.reports == twice.reports
    for ours, theirs in ((twice.gradients, once.gradients), (twice.weights, once.weights)):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def again(place: Any, corpus: Path, layout: Layout, recompute: Recompute) -> Any:
    return train_on(place, corpus, layout, {}, steps=2, late=True, recompute=recompute)


def exchanged(place: Place, recompute: Recompute) -> tuple[dict[str, int], dict[str, int], dict[str, Tensor]]:
    """How often this rank exchanged what, in forward and backward of 8 layers; and the gradients."""
    from minimax_train.engine.stage import bare, build_stage

    with session(layout=Layout(expert=2, token_groups=2), place=place) as joined:
        decoder = bare(build_stage(hybrid(), joined, seed=3))
        row = Row.of_documents([torch.arange(100) + place.rank])
        decoder.recompute = recompute
        decoder(row.with_labels((row.tokens + 7) % 300))[0].sum().backward()
        gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        return dict(joined.groups.expert_block.calls), dict(joined.groups.expert.calls), gradients


def test_the_journey_of_the_rows_is_kept() -> None:
    """Run twice, rows travel again; how many go where was counted once. Selective: the experts' products alone are made again."""
    once, selective, twice = (run_ranks(2, exchanged, recompute) for recompute in ("none", "selective", "full"))
    for one, other in zip(once, selective, strict=True):
        assert one[:2] == other[:2]
        assert all(torch.equal(other[2][name], gradient) for name, gradient in one[2].items())
    for (counts, rows, gradients), (counts_again, rows_again, same_gradients) in zip(once, twice, strict=True):
        assert counts == counts_again == {"counts": 8}
        back = {"dispatch gradients": 2 * 8, "combine gradients": 2 * 8}
        assert rows == {"dispatch": 2 * 8, "combine": 2 * 8} | back
        assert rows_again == {"dispatch": 2 * 2 * 8, "combine": 2 * 2 * 8} | back
        assert all(torch.equal(same_gradients[name], gradient) for name, gradient in gradients.items())


def told(place: Place) -> list[str]:
    """What a layer does between beginning to exchange counts and asking for them."""
    from minimax_train.engine.stage import bare, build_stage
    from minimax_train.model import router

    log: list[str] = []

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            log.append(name)
            return work(*arguments)

        return function

    with session(layout=Layout(context=2, expert=2), place=place) as joined, pytest.MonkeyPatch.context() as patch:
        experts = bare(build_stage(hybrid(), joined, seed=3)).blocks["0"].experts
        patch.setattr(router, "all_sum", noted("the unit's sum", router.all_sum))
        patch.setattr(Channel, "begin_all_gather", noted("begin counts", Channel.begin_all_gather))
        patch.setattr(OnHost, "finish", noted("ask for counts", OnHost.finish))
        experts(torch.randn(16, 32, generator=torch.Generator().manual_seed(place.rank)))
    return log


def test_counts_travel_while_the_router_works_out_its_report() -> None:
    assert run_ranks(2, told) == [["begin counts", "the unit's sum", "ask for counts"]] * 2
