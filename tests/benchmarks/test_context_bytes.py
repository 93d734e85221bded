"""The byte formulas of benchmarks/context_bytes.py: at a million tokens, and against the ring's own plan."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimax_train.model.lightning import decay_slopes
from parallel.pieces import Pieces, cut_row
from parallel.ring_plan import rows_sent
from tests.parallel.packings import drawn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def context_bytes() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("context_bytes")


def test_a_million_tokens(context_bytes: Any) -> None:
    """64 ranks, one document: at most 3 % of an all-gather of the same pieces, pruned or by choice; counted head by head."""
    by = {one["scheme"]: one for one in context_bytes.states((0, context_bytes.TOKENS), 64)}
    state = 64 * 128 * 128 * 4
    assert by["gather"]["mean"] == 126 * state
    assert by["LASP-2"]["mean"] == 63 * state
    assert by["transpose"]["mean"] == pytest.approx(4 * state * 63 / 64)
    slow = np.mean([(np.exp(-decay_slopes(64, layer, 80).numpy() * np.float32(8192)) > 0).mean() for layer in range(80) if layer % 8 != 7])
    assert by["pruned"]["mean"] == pytest.approx(state * 63 / 64 * (2 + 2 * slow * 125 / 64))
    for kind in ("pruned", "auto"):
        assert by[kind]["mean"] < 0.03 * by["gather"]["mean"]
        assert by[kind]["back_mean"] == pytest.approx(by[kind]["mean"])


def test_documents_only_ever_prune(context_bytes: Any) -> None:
    for ranks in (2, 16, 64):
        one, packed = (
            {x["scheme"]: x for x in (*context_bytes.states(b, ranks), *context_bytes.keys_values(b, ranks))}
            for b in context_bytes.rows().values()
        )
        for scheme in ("pruned", "auto", "ring"):
            assert packed[scheme]["mean"] < one[scheme]["mean"]
            assert packed[scheme]["steps"] <= one[scheme]["steps"]


def test_documents_of_one_length(context_bytes: Any) -> None:
    """64 ranks, documents of 32K and of 8K, a piece: auto is pruned there, and where no document crosses nothing is sent in no step."""
    for length, most in ((32_768, 9.6e6), (8192, 0.0)):
        by = {one["scheme"]: one for one in context_bytes.states(tuple(range(0, context_bytes.TOKENS + 1, length)), 64)}
        assert by["auto"]["mean"] == by["pruned"]["mean"] <= most
        assert by["auto"]["steps"] == by["pruned"]["steps"]
        assert by["auto"]["transposed_layers"] == 0
    assert by["auto"]["steps"] == 0


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rows_of_the_ring(context_bytes: Any, ranks: int) -> None:
    """Counted run by run here, rectangle by rectangle in the plan."""
    from context_formula import ring_rows

    rows = [*drawn(20), (0, 96), tuple(range(97))]
    cases = [cut_row(bounds, ranks, owners) for bounds in rows for owners in ("zigzag", "balanced")]
    cases += [Pieces(bounds, tuple(p // 2 for p in range(2 * ranks))) for bounds in rows]
    for pieces in cases:
        ours, plan = ring_rows(pieces.bounds, pieces.owners), rows_sent(pieces)
        assert ours.hops == len(plan)
        assert ours.sent.tolist() == [sum(sent[rank] for sent in plan.values()) for rank in range(ranks)]
        assert ours.received.tolist() == [sum(sent[(rank - hop) % ranks] for hop, sent in plan.items()) for rank in range(ranks)]
