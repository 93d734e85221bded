"""What context_extension.py says of its runs: means and spreads over seeds, the marks, the table, the picture."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
from extension_arms import ARMS, Outcome, Size
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from minimax_train.report import canvas
from minimax_train.report.canvas import INK, VERMILION


def of(outcomes: Sequence[Outcome], arm: str) -> list[Outcome]:
    """One arm's, by seed."""
    return sorted((outcome for outcome in outcomes if outcome.arm == arm), key=lambda outcome: outcome.seed)


def gains(outcomes: Sequence[Outcome], length: int, arm: str = "staged") -> list[tuple[float, float]]:
    """Of each seed: the share of right answers at `length` before and after an arm."""
    return [(a.at(length), b.at(length)) for a, b in zip(of(outcomes, "before"), of(outcomes, arm), strict=True)]


def missed(outcomes: Sequence[Outcome], length: int, *, gain: float, after: float) -> list[str]:
    """A line for every seed in which the staged arm misses a mark at `length`."""
    return [
        f"seed {outcome.seed}: {old:.0%} -> {new:.0%} at {length:,}; wanted are {100 * gain:.0f} points more, and {after:.0%} at least"
        for outcome, (old, new) in zip(of(outcomes, "staged"), gains(outcomes, length), strict=True)
        if new - old < gain or new < after
    ]


def spread(values: Sequence[float]) -> str:
    """Percent: the mean, and the least and the most where there are several."""
    span = f" ({100 * min(values):.0f} to {100 * max(values):.0f})" if len(values) > 1 else ""
    return f"{100 * mean(values):.0f}{span}"


def accuracy_table(outcomes: Sequence[Outcome], lengths: Sequence[int]) -> str:
    """Right answers in percent, a line an arm, a column a length."""
    lines = ["| | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for arm in ("before", *ARMS):
        mine = of(outcomes, arm)
        if mine:
            cells = " | ".join(spread([outcome.at(length) for outcome in mine]) for length in lengths)
            lines.append(f"| {arm} | {cells} |")
    return "\n".join(lines)


def norm_table(outcomes: Sequence[Outcome]) -> str:
    """Gradient norms, a line a stage of each arm: the first step's, median and largest, each the mean over seeds; the largest of all."""
    lines = ["| | stage | first step | median | largest | largest of any seed | not applied | loss, first -> last step |", "|---" * 8 + "|"]
    for arm in ("before", *ARMS):
        for courses in zip(*(outcome.courses for outcome in of(outcomes, arm)), strict=True):
            first, middle, most = (mean(getattr(course, name) for course in courses) for name in ("first", "median", "most"))
            begin, end = (mean(course.loss[i] for course in courses) for i in (0, 1))
            lines.append(
                f"| {arm} | {courses[0].stage} | {first:.2f} | {middle:.2f} | {most:.2f} | {max(c.most for c in courses):.2f} | "
                f"{sum(c.refused for c in courses)} | {begin:.3f} -> {end:.3f} |"
            )
    return "\n".join(lines)


def page(outcomes: Sequence[Outcome], size: Size, facts: Mapping[str, Any], marks: str) -> str:
    """The results as Markdown."""
    first, last = size.plan.stages[0], size.plan.stages[1:]
    seeds = len(of(outcomes, "before"))
    counted = f"{size.samples} samples at each of {len(outcomes[0].depths)} depths"
    arms = [f"- **{arm}**: {about}" for arm, about in ARMS.items() if arm in size.arms]
    return "\n".join(
        [
            "# The context grows",
            "",
            f"A hybrid of {size.plan.model.num_layers} layers ({', '.join(size.plan.model.pattern)}), trained from nothing on the "
            f"retrieval puzzle at length {first.length:,} ({first.steps:,} steps of {first.batch_tokens:,} tokens); then "
            f"{sum(s.tokens for s in last):,} tokens of extension to {last[-1].length:,}. Asked is `multi_key` with a key for each "
            f"{size.tokens_a_key} tokens: what has to be told apart grows with the length. Percent of answers right, {counted}; over "
            f"{seeds} seeds (weights, documents and order), mean (least to most). `before` is the first stage's model, which never saw "
            "more: untrained extrapolation.",
            "",
            accuracy_table(outcomes, size.lengths),
            "",
            marks,
            "",
            *arms,
            "",
            "Gradient norms by stage, before clipping at "
            f"{size.plan.optimizer.clip_grad:g}; means over seeds. The first step is the first at the new length.",
            "",
            norm_table(outcomes),
            "",
            f"{facts['processor']}, {facts['cores']} cores that others used too (load {facts['load']:.1f}), two runs of one thread at a "
            f"time, {facts['minutes']:.0f} minutes; torch {facts['torch']}, megatron-core {facts['megatron-core']}, fp32, {facts['date']}.",
            "",
        ]
    )


def draw(outcomes: Sequence[Outcome], size: Size) -> bytes:
    """PNG: maps of length and depth, before and after each arm, means over seeds on one scale."""
    arms = [arm for arm in ("before", *ARMS) if of(outcomes, arm)]
    rows = -(-len(arms) // 2)
    figure = canvas.sheet(
        0.8 + 2.35 * rows, f"The context grows: answers right, by length and depth, mean of {len(of(outcomes, arms[0]))} seeds"
    )
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for number, (one, arm) in enumerate(zip(axes, arms, strict=False)):
        image = _map(one, of(outcomes, arm), size, arm, left=number % 2 == 0)
    for one in axes[len(arms) :]:
        one.set_visible(False)
    bar = figure.colorbar(image, ax=list(axes), pad=0.015, aspect=28)
    bar.set_label("answers right, %", fontsize=10.5, color=INK)
    bar.ax.tick_params(labelsize=9.5, labelcolor=INK)
    return canvas.png(figure)


def _map(axes: Axes, outcomes: Sequence[Outcome], size: Size, arm: str, *, left: bool) -> AxesImage:
    depths = outcomes[0].depths
    share = np.array([[mean(outcome.right[length][i] for outcome in outcomes) for length in size.lengths] for i in range(len(depths))])
    canvas.style(axes, x="length, tokens", y="depth" if left else "")
    axes.grid(False)
    trained = size.plan.stages[0].length if arm in ("before", "not longer") else size.plan.stages[-1].length
    canvas.heading(axes, f"{arm}: trained to {trained:,}")
    image = axes.imshow(100 * share, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(size.lengths)), [f"{length:,}" for length in size.lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for (depth, length), value in np.ndenumerate(share):
        axes.text(length, depth, f"{100 * value:.0f}", ha="center", va="center", fontsize=10, color=INK if value > 0.55 else "white")
    inside = sum(length <= trained for length in size.lengths)
    if inside < len(size.lengths):
        axes.axvline(inside - 0.5, color="white", linewidth=5, zorder=3)
        axes.axvline(inside - 0.5, color=VERMILION, linewidth=2.2, linestyle=(0, (4, 2)), zorder=4)
    return image
