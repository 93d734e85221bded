"""The tables of context_bytes.py."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from context_count import GROUPS, HEADS, LAYERS, SIZE, TOKENS, Counted

STATES = ("LASP-2", "gather", "transpose", "pruned", "auto")
KEYS_VALUES = ("ring", "two levels, between nodes", "two levels, NVLink")


def tables(
    formula: Sequence[dict[str, Any]],
    balances: Sequence[dict[str, Any]],
    checked: Sequence[Counted],
    rows: Mapping[str, tuple[int, ...]],
    facts: Mapping[str, Any],
) -> str:
    packed = len(rows["packed"]) - 1
    lines = [
        "# Bytes between context ranks at 1,048,576 tokens",
        "",
        "MiniMax-Text-01: 70 lightning layers of 64 heads x 128 x 128 (a state is 4.19 MB in fp32; slopes of the model), 10 softmax layers "
        "of 8 key-value heads x 128 in bf16; tensor parallelism 1, zigzag pieces. MB (1e6 bytes) that a rank sends for one layer: mean of "
        f"the ranks, and the busiest in brackets. By formula, see below for what was counted. {facts['date']}.",
        "",
        "LASP-2 is its published all-gather (arXiv 2502.07563): ranks hold the sequence in order and send one state each, (CP-1) S. Ours "
        "(gather) sends two, since zigzag gives a rank two pieces, for the sake of softmax layers' balance. pruned leaves out what has "
        "decayed to 0.0 in fp32; auto takes for each row and layer what sends least.",
    ]
    for name in rows:
        what = f"a packed row of {packed} documents of 8K to 128K tokens" if name == "packed" else "one document"
        mine = [one for one in formula if one["row"] == name]
        lines += ["", f"## States, {what}", "", *_states(mine), "", f"## Keys and values, {what}", "", *_keys_values(mine)]
    lines += ["", "## Balance of softmax attention", "", *_balance(balances)]
    lines += ["", "## Counted on gloo ranks", "", *_counted(checked)] if checked else []
    return "\n".join(lines) + "\n"


def _megabytes(one: Mapping[str, Any], prefix: str = "") -> str:
    mean, busiest = one[f"{prefix}mean"] / 1e6, one[f"{prefix}busiest"] / 1e6
    digits = 1 if mean < 100 else 0
    return f"{mean:,.{digits}f}" if mean == busiest else f"{mean:,.{digits}f} ({busiest:,.{digits}f})"


def _states(formula: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"| CP | {' | '.join(STATES)} | auto / gather | auto / LASP-2 | layers on transpose | steps of auto | auto, backward |",
        "|---" * (len(STATES) + 6) + "|",
    ]
    for ranks, group in groupby(formula, key=lambda one: one["ranks"]):
        by = {one["scheme"]: one for one in group}
        auto, mean = by["auto"], {name: by[name]["mean"] for name in STATES}
        lines.append(
            f"| {ranks:,} | {' | '.join(_megabytes(by[name]) for name in STATES)} | {mean['auto'] / mean['gather']:.1%} | "
            f"{mean['auto'] / mean['LASP-2']:.1%} | {auto['transposed_layers']} of 70 | {auto['steps']:.1f} | {_megabytes(auto, 'back_')} |"
        )
    return [*lines, "", "Steps one after the other, mean over layers: gather 1, transpose 2, pruned 1 or (some head is slow) 2."]


def _keys_values(formula: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| CP | ring | hops | backward |" + "".join(f" {name} | {what} |" for name, what in zip(KEYS_VALUES[1:],
             ("hops | backward", "backward"), strict=True)), "|---" * 9 + "|"]  # fmt: skip
    for ranks, group in groupby(formula, key=lambda one: one["ranks"]):
        cells = []
        by = {one["scheme"]: one for one in group}
        for name in KEYS_VALUES:
            if name not in by:
                cells += ["-"] * (2 if name.endswith("NVLink") else 3)
            else:
                steps = [] if name.endswith("NVLink") else [f"{by[name]['steps']:,}"]
                cells += [_megabytes(by[name]), *steps, _megabytes(by[name], "back_")]
        lines.append(f"| {ranks:,} | {' | '.join(cells)} |")
    return [*lines, "", "Two levels: 8 neighbours of a node trade tokens for heads (q, k, v, and o back), the ring runs between nodes."]


def _balance(balances: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "The busiest rank's (query, key) pairs over the mean rank's: mean over rows (worst row).",
        "",
        "| row | CP | contiguous | zigzag | balanced |",
        "|---|---|---|---|---|",
    ]
    for (row, ranks), group in groupby(balances, key=lambda one: (one["row"], one["ranks"])):
        cells = [f"{one['mean']:.2f} ({one['worst']:.2f})" for one in group]
        lines.append(f"| {row} | {ranks} | {' | '.join(cells)} |")
    return lines


def _counted(checked: Sequence[Counted]) -> list[str]:
    lines = [
        f"{HEADS} heads ({GROUPS} key-value heads) of {SIZE}, {TOKENS:,} tokens, the same two rows 256 times shorter, slopes of layers "
        f"{', '.join(map(str, LAYERS))} 256 times faster. Forward and backward, every rank; a case is equal where every rank's bytes are.",
        "",
        "| CP | exchange | key-value ranks | cases | equal | counted, all ranks and cases | formula |",
        "|---" * 7 + "|",
    ]

    def key(one: Counted) -> tuple[int, str, int]:
        return one.ranks, one.case.kind, one.case.key_value

    for (ranks, kind, degree), group in groupby(sorted(checked, key=key), key=key):
        cases = list(group)
        ours, theirs = (sum(sum(sum(v) for v in getattr(one, name).values()) for one in cases) for name in ("counted", "formula"))
        lines.append(f"| {ranks} | {kind} | {degree} | {len(cases)} | {sum(c.equal for c in cases)} | {ours:,} | {theirs:,} |")
    return lines
