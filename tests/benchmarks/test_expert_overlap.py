"""What benchmarks/expert_overlap.py claims: the recorded order, how it plays on streams, and the byte formula."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.testing import run_ranks
from tests.benchmarks.test_context_bytes import BENCHMARKS


@pytest.fixture
def module() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(f"expert_{name}") for name in ("schedule", "ranks", "overlap")})


def test_streams_by_hand(module: Any) -> None:
    """An exchange of 2 under work of 3, then one of 2 that nothing hides: 4 of exchange, 3 of compute, 5 in all."""
    event, rows = module.schedule.Event, {"stream": "expert", "rows": 2}
    events = [
        event(kind="begin", name="a", number=0, **rows),
        event(kind="work", name="w", number=0, stream="compute", rows=3),
        event(kind="finish", name="a", number=0, stream="expert"),
        event(kind="begin", name="b", number=0, **rows),
        event(kind="finish", name="b", number=0, stream="expert"),
    ]
    played = module.schedule.play(events, module.schedule.Costs(exchange=4 / 3))
    assert played.span == pytest.approx(5 / 3)
    assert played.hidden == pytest.approx(0.5)
    with pytest.raises(ValueError, match="never finished"):
        module.schedule.play(events[:-1], module.schedule.Costs(exchange=1.0))
    with pytest.raises(ValueError, match="streams"):
        module.schedule.play(events, module.schedule.Costs(exchange=1.0, slices=0.5))


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_schedule_hides_what_it_can(module: Any, groups: int) -> None:
    """Forward 1 - 1 / g, backward half of what is left besides (arXiv 2501.08313 section 3); longer exchanges hide less."""
    forward, backward = module.schedule.record(4, 1, groups)
    assert module.schedule.play(forward, module.schedule.Costs(exchange=1.0)).hidden == pytest.approx(1 - 1 / groups)
    assert module.schedule.play(backward, module.schedule.Costs(exchange=1.0)).hidden == pytest.approx(1 - 0.5 / groups)
    long = module.schedule.play(forward, module.schedule.Costs(exchange=1.5)).hidden
    assert long == pytest.approx({1: 0, 2: 0.5, 4: 7 / 12, 8: 0.625}[groups])


def test_every_mark_holds(module: Any) -> None:
    shares = module.overlap.hidden()
    assert all(one.good for one in shares)
    assert {one.groups for one in shares if one.marked} == {1, 2, 4, 8}
    one_slice = [one.hidden for one in shares if (one.expert, one.groups, one.way, one.ratio) == (1, 1, "backward", 1.0)]
    assert one_slice == [pytest.approx(0.5)], "weights' gradients hide the scatter where nothing is combined"
    assert all(one.hidden == pytest.approx(one.bound) for one in shares if one.marked and one.way == "forward"), "none falls short"
    both = [one for one in shares if one.expert > 1 and one.ratio == 1.0 and one.way == "backward"]
    assert all(one.hidden == pytest.approx(1 - 0.5 / one.groups) for one in both), "weights' gradients hide the last way back"


@pytest.mark.parametrize("share", [0.1, 0.31, 0.43, 0.5, 0.9])
def test_compute_waits_for_no_dispatch_that_is_only_sent_on(module: Any, share: float) -> None:
    """Where it did, with two groups 1 - share of the exchange lay bare. So it does where the thread itself waits."""
    forward, _ = module.schedule.record(2, 2, 2)
    cost = module.schedule.Costs(exchange=1.0, slices=share)
    assert module.schedule.play(forward, cost).hidden == pytest.approx(0.5)
    waiting = [replace(event, waits="compute") for event in forward]
    assert module.schedule.play(waiting, cost).hidden == pytest.approx(min(0.5, share))


def test_a_schedule_without_overlap_is_found_out(module: Any) -> None:
    """Each exchange finished where it is begun hides nothing, whatever the groups."""
    forward, _ = module.schedule.record(4, 1, 4)
    blocking = [e for event in forward for e in ((event, _finish(event)) if event.kind == "begin" else (event,)) if event.kind != "finish"]
    assert module.schedule.play(blocking, module.schedule.Costs(exchange=0.5)).hidden == pytest.approx(0)


def _finish(begin: Any) -> Any:
    return type(begin)(kind="finish", name=begin.name, number=begin.number, stream=begin.stream)


@pytest.mark.parametrize(("expert", "slices"), [(2, 1), (2, 2)])
def test_traces_of_real_ranks(module: Any, tmp_path: Path, expert: int, slices: int) -> None:
    """With 2 and 4 groups: the recorded order, and between begin and finish of each exchange the products it is meant to hide behind."""
    cases = [module.ranks.Case(expert=expert, slices=slices, groups=groups, tokens=64, hidden=16, width=16) for groups in (2, 4)]
    run_ranks(expert * slices, module.ranks.trace_on_rank, cases, tmp_path)
    for number, case in enumerate(cases):
        traces = tuple(module.overlap.Trace(tmp_path / f"{number}-0-{rank}.json") for rank in range(case.ranks))
        assert module.overlap.Traced(case=case, traces=traces).in_order
        for trace in traces:
            assert hidden_behind_products(trace, module.ranks.PRODUCTS) == wanted(case.groups, slices)


def hidden_behind_products(trace: Any, products: tuple[str, ...]) -> dict[str, list[int]]:
    """Exchange -> the token groups for which a product lies between its begin and its finish."""
    found: dict[str, list[int]] = {}
    for exchange in trace.exchanges:
        between = [product for product in products for name in exchange.between if name.endswith(product)]
        found.setdefault(exchange.name, []).extend([exchange.hop - 1] if between else [])
    return found


def wanted(groups: int, slices: int) -> dict[str, list[int]]:
    """Not the first way there, nor in the forward pass the last way back: weights' gradients hide that of the backward pass. With slices
    the second dispatch and the last combine but one do not either, for a CPU's thread waits for a dispatch in order to gather."""
    every = list(range(groups))
    if slices == 1:
        forward = {"dispatch": every[1:], "combine": every[:-1]}
        return forward | {"dispatch gradients": every[1:], "combine gradients": every}
    forward = {"dispatch": every[2:], "gather": every[1:], "scatter": every[:-1], "combine": every[:-2]}
    backward = {"dispatch gradients": every[2:], "gather gradients": every[1:], "scatter gradients": every, "combine gradients": every}
    return forward | backward


def test_bytes_of_real_ranks(module: Any) -> None:
    shape = {"groups": 2, "hidden": 8, "width": 8}
    cases = [
        module.ranks.Case(expert=expert, slices=slices, tokens=tokens, routing=routing, **shape)
        for expert, slices in ((2, 1), (2, 2))
        for tokens, routing in ((16, "even"), (13, "random"))
    ]
    found = module.ranks.count(cases)
    assert all(one.equal for one in found)
    assert not any(type(one)(case=one.case, counted=[{}] * one.case.ranks, formula=one.formula).equal for one in found)
    torch.testing.assert_close(module.ranks.even_bytes(cases[0]), 16 * 2 * 8 * 4 / 2)
