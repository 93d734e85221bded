"""Bytes that context ranks of the full model send at a million tokens, by formula, and the formula against real gloo ranks.

    python benchmarks/context_bytes.py [--formula]

MiniMax-Text-01's 70 lightning and 10 softmax layers, 1,048,576 tokens, tensor parallelism 1: one document, and a packed row of documents of
8K to 128K tokens (drawn by us, log-uniform, seed 0). The formula (context_formula.py) is compared with what Channel counts on 2, 4 and 8
gloo ranks in small layers (context_count.py); exit 1 where a byte differs. `--formula`: without those ranks, nothing written.
Writes benchmarks/results/context_bytes.{json,md,png}.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import context_count
import numpy as np
from context_draw import draw
from context_formula import crossings, keys_values_sent, lasp2_sent, mirrored, states_sent
from context_words import tables
from machine import machine

from minimax_train.model.config import text01
from minimax_train.model.lightning import decay_slopes
from parallel.exchange import slow_heads
from parallel.pieces import Pieces, balanced, zigzag

TOKENS = 1 << 20
RANKS = tuple(2**power for power in range(1, 11))
COUNTED_RANKS = (2, 4, 8)
KINDS = ("gather", "transpose", "pruned", "auto")
NODE = 8
"""Key-value ranks of the two-level form: as many as key-value heads, and GPUs in a node."""
BALANCE_RANKS, BALANCE_ROWS = (8, 32, 128), 20


def packed_row(seed: int, tokens: int = TOKENS) -> tuple[int, ...]:
    """cu_seqlens of documents of 8K to 128K tokens, log-uniform; the last one is cut where the row ends."""
    generator, bounds = np.random.default_rng(seed), [0]
    while bounds[-1] < tokens:
        bounds.append(min(bounds[-1] + int(8192 * 16 ** generator.random()), tokens))
    return tuple(bounds)


def rows() -> dict[str, tuple[int, ...]]:
    return {"one document": (0, TOKENS), "packed": packed_row(0)}


def figures(sent: np.ndarray, back: np.ndarray) -> dict[str, float]:
    """Of the ranks' bytes, forward and backward: mean and busiest."""
    return {
        "mean": float(sent.mean()), "busiest": float(sent.max()), "back_mean": float(back.mean()), "back_busiest": float(back.max()),
    }  # fmt: skip


def states(bounds: Sequence[int], ranks: int) -> list[dict[str, Any]]:
    """Each exchange of states, averaged over the model's lightning layers."""
    model, owners = text01(), zigzag(ranks)
    heads, size = model.num_attention_heads, model.head_dim
    ways = crossings(bounds, owners), crossings(*mirrored(bounds, owners))
    layers = [layer for layer, kind in enumerate(model.layer_kinds) if kind == "lightning"]
    slow = [len(slow_heads(decay_slopes(heads, layer, model.num_layers).tolist(), TOKENS // (2 * ranks))) for layer in layers]
    peer = np.full(ranks, lasp2_sent(ranks, heads, size))
    found = [{"scheme": "LASP-2", "steps": 1.0, **figures(peer, peer)}]
    transposed = states_sent("transpose", ways[0], heads, size, 0).bytes
    for kind in KINDS:
        forward, back = ([states_sent(kind, way, heads, size, one) for one in slow] for way in ways)
        found.append(
            {
                "scheme": kind,
                "steps": float(np.mean([sent.steps for sent in forward])),
                "transposed_layers": sum(np.array_equal(sent.bytes, transposed) for sent in forward),
                "slow_share": float(np.mean(slow)) / heads,
                **figures(*(np.mean([sent.bytes for sent in way], axis=0) for way in (forward, back))),
            }
        )
    return found


def keys_values(bounds: Sequence[int], ranks: int) -> list[dict[str, Any]]:
    """The ring, and the two-level form between nodes and inside one."""
    model, owners = text01(), zigzag(ranks)
    shape = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    one = keys_values_sent(bounds, owners, *shape)
    found = [{"scheme": "ring", "steps": one.hops, **figures(one.ring, one.ring_back)}]
    if ranks >= NODE:
        two = keys_values_sent(bounds, owners, *shape, degree=NODE)
        found.append({"scheme": "two levels, between nodes", "steps": two.hops, **figures(two.ring, two.ring_back)})
        found.append({"scheme": "two levels, NVLink", "steps": 4, **figures(two.heads, two.heads_back)})
    return found


def by_formula() -> list[dict[str, Any]]:
    return [
        {"row": name, "ranks": ranks, **one}
        for name, bounds in rows().items()
        for ranks in RANKS
        for one in (*states(bounds, ranks), *keys_values(bounds, ranks))
    ]


def counted() -> list[context_count.Counted]:
    """Small forms of both rows on real ranks."""
    shrink = TOKENS // context_count.TOKENS
    small = {name: tuple(bound // shrink for bound in bounds) for name, bounds in rows().items()}
    return [one for ranks in COUNTED_RANKS for one in context_count.count(small, ranks, TOKENS)]


def balance() -> list[dict[str, Any]]:
    """The busiest rank's softmax attention over the mean rank's, for ways to share pieces out; over rows of different seeds."""
    found = []
    packed = {f"packed, {BALANCE_ROWS} rows": [packed_row(seed) for seed in range(BALANCE_ROWS)]}
    for name, many in ({"one document": [(0, TOKENS)]} | packed).items():
        for ranks in BALANCE_RANKS:
            contiguous = tuple(piece // 2 for piece in range(2 * ranks))
            for owners in ("contiguous", "zigzag", "balanced"):
                table = {"contiguous": lambda _, c=contiguous, r=ranks: c, "zigzag": lambda _, r=ranks: zigzag(r),
                         "balanced": lambda b, r=ranks: balanced(b, r)}[owners]  # fmt: skip
                values = [Pieces(bounds, table(bounds)).imbalance() for bounds in many]
                found.append({"row": name, "ranks": ranks, "owners": owners, "mean": float(np.mean(values)), "worst": max(values)})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formula", action="store_true", help="no gloo ranks, nothing written")
    formula_only = parser.parse_args().formula
    facts, formula, balances = machine(), by_formula(), balance()
    checked = [] if formula_only else counted()
    text = tables(formula, balances, checked, rows(), facts)
    print(text)
    if not formula_only:
        results = Path(__file__).parent / "results"
        small = [{"ranks": c.ranks, **{k: v for k, v in vars(c.case).items() if k != "bounds"}, "equal": c.equal} for c in checked]
        record = {"machine": facts, "formula": formula, "balance": balances, "packed_row": rows()["packed"], "counted": small}
        (results / "context_bytes.json").write_text(json.dumps(record, indent=1) + "\n")
        (results / "context_bytes.md").write_text(text)
        (results / "context_bytes.png").write_bytes(draw(formula))
    wrong = [one for one in checked if not one.equal]
    for one in wrong:
        print(f"not as many bytes as by formula: {one}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
