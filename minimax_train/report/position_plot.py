"""The plot of loss by position in the document, before and after each extension stage."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from minimax_train.report import canvas
from minimax_train.report.canvas import BLUE, INK, RULE, VERMILION
from minimax_train.report.plots import Plot
from minimax_train.report.positions import PositionLosses, coarser
from minimax_train.report.words import binary, change, difference, nats

_TITLE = "Loss by position, before and after extension"
_COLUMNS = 2


def position_plot(name: str, positions: tuple[PositionLosses, ...] | None) -> Plot:
    """One panel a stage of the run `name`: loss by position before and after it, change below, previous length as a vertical line."""
    if not positions:
        absent = "not evaluated: run `minimax-train evaluate positions RUN`."
        return Plot(name="positions", title=_TITLE, caption="", absent=absent)
    columns = min(_COLUMNS, len(positions))
    rows = math.ceil(len(positions) / columns)
    figure = canvas.sheet(4.6 * rows + 0.5, f"{name}: {_TITLE.lower()}")
    panels = np.atleast_1d(figure.subfigures(rows, columns, squeeze=False).ravel())
    for panel, stage in zip(panels, positions, strict=False):
        losses = _panel(panel, coarser(stage))
    canvas.legend(figure, losses)
    said = [
        f"{stage.stage}: beyond {stage.previous_length:,} tokens {nats(stage.beyond_before)} to {nats(stage.beyond_after)}"
        for stage in positions
    ]
    return Plot(
        name="positions",
        title=_TITLE,
        figure=figure,
        alt=f"For each extension stage, step lines of loss by position before and after it, their difference below. {'; '.join(said)}.",
        caption="The same held-out documents and the new RoPE base before and after, so the change is the stage's training alone. The "
        "vertical line is the previous length: to its right are positions the model had not been trained on before. Neighbouring bins are "
        "merged to a sixth of a doubling, weighted by tokens.",
    )


def _panel(figure: SubFigure, stage: PositionLosses) -> Axes:
    losses, changes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
    edges = stage.edges.copy()
    if edges[0] <= 0:  # zero has no place on a logarithmic axis: the first bin is drawn one doubling wide
        edges[0] = edges[1] / 2
    canvas.style(losses, y="loss (nats per token)")
    canvas.heading(
        losses, f"{canvas.fit(22, stage.stage)}: length {stage.previous_length:,} → {stage.length:,}\n{_changes(stage)}", size=10
    )
    losses.stairs(stage.before, edges, baseline=None, color=VERMILION, linewidth=1.8, linestyle=(0, (4, 1.5)), label="before the stage")
    losses.stairs(stage.after, edges, baseline=None, color=BLUE, linewidth=2.2, label="after the stage")
    canvas.style(changes, x="position in the document (K = 1,024)", y="change (nats)")
    step = stage.after - stage.before
    for sign, colour in ((-1, BLUE), (1, VERMILION)):
        changes.stairs(np.where(step * sign > 0, step, np.nan), edges, fill=True, color=colour, alpha=0.75)
    changes.axhline(0, color=INK, linewidth=1)
    for axes in (losses, changes):
        _position_axis(axes, edges, stage.previous_length)
    return losses


def _changes(stage: PositionLosses) -> str:
    inside = change(difference(stage.inside_before, stage.inside_after))
    return f"change inside {inside}, beyond {change(difference(stage.beyond_before, stage.beyond_after))} nats"


def _position_axis(axes: Axes, edges: np.ndarray, previous_length: int) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    axes.grid(True, axis="x", color=RULE, linewidth=0.6)
    axes.axvline(previous_length, color=INK, linewidth=1.4, linestyle=(0, (1.5, 1.5)))
    axes.axvspan(previous_length, max(edges[-1], previous_length), color=canvas.BANDS[1], linewidth=0, zorder=0)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(binary))
