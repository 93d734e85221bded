"""The plot of needles found, by length and depth."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import PercentFormatter

from minimax_train.report import canvas
from minimax_train.report.canvas import INK, VERMILION
from minimax_train.report.needles import NeedleMaps, TaskMap
from minimax_train.report.plots import Plot

_TITLE = "Needles found, by length and depth"
_SAID = {
    "single": "single: one key, one number",
    "variables": "variables: which five have the value, in a chain",
}
_ROOM = (16, 20)  # lengths and depths up to which numbers fit into cells


def needle_plot(name: str, needles: NeedleMaps | None) -> Plot:
    """A map for each task of the run `name`: the share of right answers, lengths to the right, depths downwards."""
    if needles is None:
        return Plot(name="needle", title=_TITLE, caption="", absent="not evaluated: run `minimax-train evaluate needle RUN`.")
    heights = [1.1 + 0.33 * max(len(task.depths), 4) for task in needles.tasks]
    figure = canvas.sheet(sum(heights) + 0.4, f"{name}: {_TITLE.lower()}, step {needles.step:,}")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, task in zip(parts, needles.tasks, strict=True):
        _map(part, task, needles)
    means = "; ".join(f"{task.task} {_by_length(task)}" for task in needles.tasks)
    return Plot(
        name="needle",
        title=_TITLE,
        figure=figure,
        alt=f"Heat maps of the share of right answers by length and depth, a map a task. Means over the depths: {means}.",
        caption="Facts hidden in repeated sentences and asked for at the end, in RULER's manner (arXiv 2404.06654), in words of ours. "
        f"Each cell is {needles.samples:,} samples; an answer is right when greedy decoding gives every token of it. Depth 0 is before all "
        f"filler, 100% right before the question. Right of the dashed line samples are longer than the longest row trained on "
        f"({needles.trained_length:,} tokens).",
    )


def _by_length(task: TaskMap) -> str:
    return ", ".join(f"{value:.0%} at {length:,}" for length, value in zip(task.lengths, np.nanmean(task.accuracy, axis=0), strict=True))


def _said(task: str, keys: str) -> str:
    if task != "multi_key":
        return _SAID.get(task, task)
    every = keys.removeprefix("1/")
    return f"multi_key: {f'{keys} keys' if every == keys else f'a key for each {every} tokens'}, one is asked for"


def _map(figure: SubFigure, task: TaskMap, needles: NeedleMaps) -> None:
    axes: Axes = figure.add_subplot()
    canvas.style(axes, x="length, tokens", y="depth")
    axes.grid(False)
    canvas.heading(axes, _said(task.task, needles.keys))
    image = axes.imshow(task.accuracy, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(-0.5, len(task.lengths)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(task.depths)), minor=True)
    axes.grid(True, which="minor", axis="both", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(len(task.lengths)), [f"{length:,}" for length in task.lengths])
    axes.set_yticks(range(len(task.depths)), [f"{depth:.0%}" for depth in task.depths])
    if len(task.lengths) > _ROOM[0]:
        axes.tick_params(axis="x", rotation=60)
    if len(task.lengths) <= _ROOM[0] and len(task.depths) <= _ROOM[1]:
        for (depth, length), value in np.ndenumerate(task.accuracy):
            if np.isfinite(value):
                colour = INK if value > 0.55 else "white"  # viridis is bright above
                axes.text(length, depth, f"{100 * value:.0f}", ha="center", va="center", fontsize=10.5, color=colour)
    trained = int((task.lengths <= needles.trained_length).sum())
    if trained < len(task.lengths):
        axes.axvline(trained - 0.5, color="white", linewidth=6, zorder=3)  # so that it stands out from every colour
        axes.axvline(trained - 0.5, color=VERMILION, linewidth=2.5, linestyle=(0, (4, 2)), zorder=4)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=14)
    bar.set_label("right", fontsize=10.5, color=INK)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.ax.tick_params(labelsize=9.5, labelcolor=INK)
