"""Which layers a pipeline stage holds: the best cut there is, by trying all of them, and what it means for MiniMax's own model."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimax_train.model.config import text01
from minimax_train.model.count import forward_flops
from minimax_train.model.stages import cut_evenly, cut_layers
from parallel.layout import Layout

MILLION = 1 << 20


@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=9), data=st.data())
def test_no_cut_is_better(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))

    def grade(borders: tuple[int, ...]) -> tuple[int, int]:
        runs = [sum(costs[a:b]) for a, b in pairwise(borders)]
        return max(runs), sum(run**2 for run in runs)

    ours = tuple(cut_evenly(costs, parts))
    assert ours[0] == 0
    assert ours[-1] == len(costs)
    assert all(a < b for a, b in pairwise(ours))
    assert len(ours) == parts + 1
    assert grade(ours) == min(grade((0, *cut, len(costs))) for cut in combinations(range(1, len(costs)), parts - 1))
    assert tuple(cut_evenly(costs, parts)) == ours


def test_chunks_cost_what_the_model_costs() -> None:
    cut = cut_layers(text01(), Layout(pipeline=5, virtual_pipeline=2), MILLION)
    assert sum(cut.costs) == forward_flops(text01(), tokens=MILLION, squares=MILLION**2)
    assert [layer for chunk in cut.chunks for layer in chunk] == list(range(80))
    assert cut.held(3) == (cut.chunks[3], cut.chunks[8])


@pytest.mark.parametrize(("pipeline", "softmax"), [(2, 5), (5, 2), (10, 1)])
def test_divisors_of_the_ten_softmax_layers_are_even_at_a_million_tokens(pipeline: int, softmax: int) -> None:
    cut = cut_layers(text01(), Layout(pipeline=pipeline), MILLION)
    kinds = text01().layer_kinds
    assert [sum(kinds[layer] == "softmax" for layer in chunk) for chunk in cut.chunks] == [softmax] * pipeline
    assert cut.imbalance < 1.05
    assert cut.warning is None


@pytest.mark.parametrize(("pipeline", "imbalance"), [(8, 1.336), (16, 1.371)])
def test_uneven_stages_are_told(pipeline: int, imbalance: float) -> None:
    cut = cut_layers(text01(), Layout(pipeline=pipeline), MILLION)
    assert cut.imbalance == pytest.approx(imbalance, abs=5e-4)
    assert cut.warning is not None
    assert f"the dearest of {pipeline} pipeline stages costs {imbalance:.2f} times the mean at length 1048576" in cut.warning


def test_the_head_counts() -> None:
    """At 8K, where a softmax layer costs little more than a lightning one, the last of ten stages has two layers fewer."""
    assert [len(chunk) for chunk in cut_layers(text01(), Layout(pipeline=10), 8192).chunks] == [8] * 7 + [9, 9, 6]


def test_interleaved_ranks_are_judged_by_their_sum() -> None:
    cut = cut_layers(text01(), Layout(pipeline=2, virtual_pipeline=2), MILLION)
    ranks = [cut.costs[0] + cut.costs[2], cut.costs[1] + cut.costs[3]]
    assert cut.imbalance == pytest.approx(2 * max(ranks) / sum(ranks))
