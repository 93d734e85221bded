"""Predicted bytes against those that training takes on CPU ranks, to the byte; and what must hold for any layout."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from minimax_train.model.config import text01
from minimax_train.model.count import count_parameters
from minimax_train.plan import Data, LearningRate, Plan, Stage
from minimax_train.planner.in_flight import moments
from minimax_train.planner.kept import TRITON_STATES, layer_kept, total
from minimax_train.planner.memory import StageMemory, stage_memory
from minimax_train.planner.sizes import sizes_of
from minimax_train.planner.weights import count_weights
from minimax_train.recipe import load_plan
from parallel.layout import Layout
from parallel.testing import run_ranks
from tests.planner.measured import Measured, measure_all
from tests.support import little_model

MODEL = little_model(hidden_size=64, head_dim=32, expert_ffn_size=96, vocab_size=512, pattern=("lightning", "softmax"))
HEAVY: dict[str, Any] = {"model": replace(MODEL, vocab_size=8192, hidden_size=256, expert_ffn_size=512), "length": 256}
"""Weights, not activations, are most of it."""


def plan(*, length: int = 2048, rows: int = 1, recompute: Any = "none", **changes: Any) -> Plan:
    stage = Stage(
        name="one",
        length=length,
        rope_base=1e4,
        tokens=rows * length,
        batch_tokens=rows * length,
        learning_rate=LearningRate(peak=1e-3),
        recompute=recompute,
    )
    fields: dict[str, Any] = {"model": MODEL, "precision": "fp32", **changes}
    return Plan(name="little", data=Data(train="train", validation="validation"), device="cpu", stages=(stage,), **fields)


CASES: dict[tuple[int, bool], dict[str, Plan]] = {
    (1, False): {
        "fp32": plan(),
        "fp32, selective": plan(recompute="selective"),
        "bf16": plan(precision="bf16"),
        "bf16, full": plan(precision="bf16", recompute="full"),
        "fp32, mostly weights": plan(**HEAVY),
        "bf16, mostly weights": plan(**HEAVY, precision="bf16"),
    },
    (2, False): {
        "tensor": plan(layout=Layout(tensor=2)),
        "context, full": plan(length=4096, layout=Layout(context=2), recompute="full"),
        "expert, token groups, bf16": plan(rows=2, layout=Layout(expert=2, token_groups=2), precision="bf16"),
        "pipeline": plan(length=1024, rows=3, layout=Layout(pipeline=2)),
    },
    (1, True): {
        "fp32, full": plan(recompute="full"),
        "bf16, selective": plan(precision="bf16", recompute="selective"),
        "long": plan(length=8192),
    },
    (2, True): {
        "data": plan(rows=2),
        "tensor, bf16, full": plan(layout=Layout(tensor=2), precision="bf16", recompute="full"),
        "context": plan(length=4096, layout=Layout(context=2)),
        "context, bf16, full": plan(length=4096, layout=Layout(context=2), precision="bf16", recompute="full"),
        "expert": plan(rows=2, layout=Layout(expert=2)),
        "expert_tensor": plan(rows=2, layout=Layout(expert_tensor=2)),
        "pipeline, full": plan(rows=3, layout=Layout(pipeline=2), recompute="full"),
        "interleaved, bf16": plan(length=1024, rows=4, layout=Layout(pipeline=2, virtual_pipeline=2), precision="bf16"),
    },
}
"""(ranks, slow): what is trained."""


@cache
def measured(ranks: int, slow: bool) -> dict[str, list[Measured]]:
    """Of every rank; all cases in one set of processes."""
    cases = CASES[ranks, slow]
    found = run_ranks(ranks, measure_all, list(cases.values()))
    return {name: [of_rank[i] for of_rank in found] for i, name in enumerate(cases)}


@pytest.mark.parametrize(
    ("ranks", "slow", "name"),
    [
        pytest.param(ranks, slow, name, marks=pytest.mark.slow if slow else ())
        for (ranks, slow), cases in CASES.items()
        for name in cases
    ],
)  # fmt: skip
def test_predicted_is_measured(ranks: int, slow: bool, name: str) -> None:
    """Weights, gradients and optimizer state; activations; and the peak, of each pipeline rank's busiest rank."""
    case, found = CASES[ranks, slow][name], measured(ranks, slow)[name]
    pipeline = case.layout.pipeline
    for stage in range(pipeline):
        busiest = max(found[stage * ranks // pipeline : (stage + 1) * ranks // pipeline], key=lambda rank: rank.peak)
        ours = stage_memory(case, 0, ranks, device="cpu", imbalance=busiest.busiest).ranks[stage]
        print(f"{name} | {stage} | {ours.static:,} | {busiest.static:,} | {ours.peak - ours.static:,} | {busiest.peak - busiest.static:,}")
        said = f"at {ours.moment}; live there: {busiest.live[:12]}"
        assert ours.static == pytest.approx(busiest.static, rel=0.01), said
        bound = 0.05 if ranks == 1 else 0.1  # gloo's threads hold on to a tensor or two, now longer, now shorter
        assert ours.peak - ours.static == pytest.approx(busiest.peak - busiest.static, rel=bound), said
        assert ours.peak == pytest.approx(busiest.peak, rel=bound), said


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=4), Layout(pipeline=2, virtual_pipeline=2)])
def test_pipeline_ranks_hold_the_model_once(layout: Layout) -> None:
    shape = replace(load_plan("recipes.text01:shape"), layout=layout)
    cut = shape.cut(layout)
    held = [count_weights(shape, layout, cut.held(rank), layout.pipeline).numbers for rank in range(layout.pipeline)]
    assert sum(held) == count_parameters(text01()).total


def test_more_ranks_hold_less() -> None:
    """A cut by n leaves about an n-th of what is cut."""
    shape = load_plan("recipes.text01:shape")

    def numbers(layout: Layout) -> int:
        return count_weights(shape, layout, (range(8, 16),), 64).numbers

    counts = count_parameters(replace(text01(), num_layers=8))
    assert numbers(Layout(expert=32)) == pytest.approx(numbers(Layout()) - counts.experts * 31 / 32, rel=1e-3)
    assert numbers(Layout(expert=8, expert_tensor=4)) == numbers(Layout(expert=32))
    attention = counts.lightning_attention + counts.softmax_attention
    assert numbers(Layout()) - numbers(Layout(tensor=8)) == pytest.approx(attention * 7 / 8, rel=1e-3)


def test_recompute_keeps_less() -> None:
    kept = [total(layer_kept(sizes_of(plan(recompute=recompute), 0, device="cuda"), "lightning")) for recompute in ("none", "selective")]
    assert kept[0] - kept[1] == 2048 * 2 * 2 * 96 * 4  # tokens x choices x (gate and up) x width x fp32
    peaks = [worst(stage_memory(plan(recompute=recompute), 0, 1)) for recompute in ("none", "selective", "full")]
    assert peaks == sorted(peaks, reverse=True)


def worst(memory: StageMemory) -> int:
    return memory.worst.peak


def test_rows_in_flight() -> None:
    """1F1B: rank r of P holds P - r rows at most, and never more than there are. Interleaved: 2 (P - r - 1) + (V - 1) P + 1 turns."""
    for rank in range(4):
        most = [max(held.total() for _, held in moments(Layout(pipeline=4), rank, rows)) for rows in (1, 2, 16)]
        assert most == [1, min(2, 4 - rank), 4 - rank]
        turns = list(moments(Layout(pipeline=4, virtual_pipeline=2), rank, 16))
        assert max(held.total() for _, held in turns) == 2 * (3 - rank) + 4 + 1
        assert len(turns) == 32 and all(held[chunk] > 0 for chunk, held in turns)


@pytest.mark.parametrize(("tokens", "heads"), [(1024, 1), (8192, 8), (8192, 64), (131_072, 8), (1_048_576, 1)])
def test_states_between_segments_are_as_few_as_said(tokens: int, heads: int) -> None:
    """The Triton kernel's own rule, for 128 channels in bf16 on an H100."""
    triton = pytest.importorskip("minimax_train.kernels.lightning_triton", exc_type=ImportError)
    import torch

    length = triton.segment_length(rows=1, tokens=tokens, heads=heads, size=128, dtype=torch.bfloat16, processors=132)
    assert max(tokens - 1, 0) // length * heads * 128 * 128 * 4 <= TRITON_STATES * 4 * tokens * heads * 128 * 2
