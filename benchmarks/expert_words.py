"""The page of expert_overlap.py."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from expert_ranks import CHOICES, EXPERTS, PRODUCTS, Counted, even_bytes


def page(shares: Sequence[Any], traces: Sequence[Mapping[str, Any]], bytes_: Sequence[Counted], facts: Mapping[str, Any]) -> str:
    lines = ["# Expert parallelism: overlap and bytes", "", "## What the schedule can hide", "", *_played(shares)]
    lines += ["", "## The order on real ranks", "", *_traced(traces, facts)] if traces else []
    lines += ["", "## Bytes", "", *_counted(bytes_)]
    return "\n".join(lines) + "\n"


def _played(shares: Sequence[Any]) -> list[str]:
    ratios = sorted({one.ratio for one in shares})
    lines = [
        "**A simulation, no GPU was used.** The order of begins, finishes and products is recorded from `parallel/experts.py` and played "
        "on one compute stream and one serial stream for each group of ranks; even routing, a host that is never late, exchange and "
        "compute that do not slow each other down. Hidden: (exchange + compute - span) / exchange of one pass. The columns are that pass's "
        "exchange over its compute; a backward pass has twice the compute of its forward, so that its ratio is half as large. "
        "1 - 1 / groups is the bound of a forward pass; a backward pass can beat it, since weights' gradients hide the last group's way "
        "back.",
        "",
        f"| layout | groups | pass | bound | {' | '.join(f'{ratio:g}' for ratio in ratios)} |",
        "|---" * (4 + len(ratios)) + "|",
    ]
    for key, group in groupby(shares, key=lambda one: (one.expert, one.slices, one.share, one.groups, one.way)):
        expert, slices, share, groups, way = key
        several = list(group)
        cells = " | ".join(f"{one.hidden:.0%}" for one in several)
        layout = f"expert {expert}" if slices == 1 else f"expert tensor {slices}" if expert == 1 else f"expert {expert} x tensor {slices}"
        if 0 < share < 1:
            layout += f", {share:.0%} of it ETP"
        lines.append(f"| {layout} | {groups} | {way} | {several[0].bound:.0%} | {cells} |")
    return [
        *lines,
        "",
        "Checked: at least 0.9 of the bound wherever the exchange is no longer than the compute, whatever share of it expert-tensor ranks "
        "(ETP) take. That needs the streams beside compute on which a gather follows its dispatch and a combine its scatter: where the "
        "thread itself waits, on a CPU, the second group's dispatch is over before the first group computes.",
    ]


def _traced(traces: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    case = traces[0]
    lines = [
        f"Profiler traces of one layer of {EXPERTS} experts, {case['tokens']:,} tokens a rank, {CHOICES} choices, hidden {case['hidden']}, "
        f"expert width {case['width']}, fp32, on four gloo ranks of one thread each; of several passes the one in which ranks "
        f"waited least. {facts['processor']}, {facts['cores']} cores that others used too (load {facts['load']:.1f}), "
        f"torch {facts['torch']}, {facts['date']}.",
        "",
        "**Order, not network speed**: ranks share a CPU, and an exchange lasts until the slowest of them has come to it. "
        "With a product between: exchanges of all ranks with an expert's product between begin and finish. Under compute: the share "
        "of their time, from begin to the end of gloo's work, in which the thread did not stand still.",
        "",
        "| expert x tensor | groups | order as recorded | pass | exchange | number | with a product between | lasted, ms | under compute |",
        "|---" * 9 + "|",
    ]
    for one in traces:
        head = f"| {one['expert']} x {one['slices']} | {one['groups']} | {'yes' if one['in_order'] else 'NO'}"
        for total in one["totals"]:
            way, name = "backward" if total["backward"] else "forward", total["name"].removesuffix(" gradients")
            mine = [e for e in one["rank_0"] if e["name"] == total["name"]]
            between = sum(any(product in ran for ran in e["between"] for product in PRODUCTS) for e in mine)
            ranks = total["number"] // len(mine)  # all ranks have one order
            lines.append(
                f"{head} | {way} | {name} | {total['number']} | {between * ranks} | {total['lasted']:.0f} | "
                f"{1 - total['waited'] / total['lasted']:.0%} |"
            )
    return lines


def _counted(bytes_: Sequence[Counted]) -> list[str]:
    lines = [
        f"What each gloo rank sent to others, as `parallel/collectives.py` counts, for one layer of {EXPERTS} experts, {CHOICES} choices, "
        f"hidden {bytes_[0].case.hidden}, fp32, forward and backward; against the formulas of docs/parallelism.md, "
        "worked out from everyone's choices. Even: every expert is chosen as often, so that dispatch and combine are n k h bytes "
        "(EP - 1) / EP on each rank; random: skewed choices, and that formula is only near. Gathers are filled up to the widest rank. "
        "Equal: every rank, every kind of exchange.",
        "",
        "| expert x tensor | groups | choices | tokens a rank | dispatch, mean of ranks | n k h bytes (EP - 1) / EP | gather | scatter | "
        "all exchanges, all ranks | formula | equal |",
        "|---" * 11 + "|",
    ]
    for one in bytes_:
        mean = {name: sum(rank.get(name, 0) for rank in one.counted) / one.case.ranks for name in ("dispatch", "gather", "scatter")}
        total, formula = (sum(sum(rank.values()) for rank in ranks) for ranks in (one.counted, one.formula))
        lines.append(
            f"| {one.case.expert} x {one.case.slices} | {one.case.groups} | {one.case.routing} | {one.case.tokens} | "
            f"{mean['dispatch']:,.0f} | {even_bytes(one.case):,.0f} | {mean['gather']:,.0f} | {mean['scatter']:,.0f} | {total:,} | "
            f"{formula:,} | {'yes' if one.equal else 'NO'} |"
        )
    return lines
