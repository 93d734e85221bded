"""The plot of what each source gave over training."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from minimax_train.report import canvas
from minimax_train.report.canvas import BLUE, GREEN, INK, ORANGE, VERMILION
from minimax_train.report.plots import TOKENS, Plot
from minimax_train.report.record import Record
from minimax_train.report.sources import Sources
from minimax_train.report.words import decimal

_COLUMNS = 60  # steps are taken together into so many: a row is of one source, so that the shares of one step are coarse
_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, "#56B4E9", "#CC79A7", "#F0E442", "#8a8f98")
_HATCHES = ("", "///", "...", "xxx", "---", "ooo", "+++", "***")


def source_plot(record: Record) -> Plot:
    """Shares of each source over tokens (areas), tokens taken of each (lines), and how full rows were."""
    title, sources = "Sources", record.sources
    if sources is None:
        return Plot(name="sources", title=title, caption="", absent="no line of metrics.jsonl says what each source gave.")
    figure = canvas.sheet(8.4, f"{record.name}: {title.lower()}")
    shares, taken, packing = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    ends = record.training.tokens[sources.line]
    _shares(shares, record, sources, ends)
    _taken(taken, record, sources, ends)
    _packing(packing, record, sources, ends)
    canvas.legend(figure, shares)
    last = ", ".join(
        f"{name} {tokens:,.0f} tokens ({epochs:.3g} epochs)"
        for name, tokens, epochs in zip(sources.names, sources.tokens[-1], sources.epochs[-1], strict=True)
    )
    filled = 1 - float(np.average(sources.efficiency, weights=_widths(record, sources, ends)))
    return Plot(
        name="sources",
        title=title,
        figure=figure,
        alt=f"Areas of each source's share of the tokens over training, lines of the tokens taken of each, and the part of rows that "
        f"documents fill. At the end: {last}. {filled:.2%} of the rows' tokens fill up; {sources.split.sum():,.0f} documents were split.",
        caption=f"At the end: {last}. An epoch is as many tokens as the source's documents have. Of the rows' tokens, {filled:.2%} fill "
        f"them up and predict nothing; {sources.split.sum():,.0f} documents were split over rows.",
    )


def _begin(record: Record, sources: Sources) -> float:
    first = int(sources.line[0])
    return float(record.training.tokens[first - 1]) if first else record.first_token


def _widths(record: Record, sources: Sources, ends: np.ndarray) -> np.ndarray:
    """Tokens of each step's rows, `[M]`."""
    return np.diff(np.concatenate([[_begin(record, sources)], ends]))


def _shares(axes: Axes, record: Record, sources: Sources, ends: np.ndarray) -> None:
    """Stacked shares, in columns of several steps of one stage."""
    canvas.style(axes, y="share of tokens")
    canvas.token_axis(axes, record, names=True)
    stage = record.training.stage[sources.line]
    lasts = []  # the last step of each column
    for number in np.unique(stage):
        mine = np.flatnonzero(stage == number)
        columns = min(len(mine), max(1, _COLUMNS * len(mine) // len(stage)))
        lasts += [int(group[-1]) for group in np.array_split(mine, columns)]
    edges = np.concatenate([[_begin(record, sources)], ends[lasts]])
    before = np.zeros((1, len(sources.names)))  # of the first line's step: what the run had before is not known, but for a whole run is 0
    gained = np.diff(np.concatenate([before, sources.tokens[lasts]]), axis=0)
    shares = gained / np.maximum(gained.sum(axis=1, keepdims=True), 1)
    base = np.zeros(len(lasts))
    for i, name in enumerate(sources.names):
        top = base + shares[:, i]
        hatch = _HATCHES[i // 8 % 8]
        axes.stairs(
            top, edges, baseline=base, fill=True, label=name, facecolor=_COLOURS[i % 8], hatch=hatch, edgecolor="white", linewidth=0.4
        )
        base = top
    for boundary in edges[1:-1][np.diff(stage[lasts]) > 0]:
        axes.axvline(boundary, color=INK, linewidth=0.8)  # the bands are hidden
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _taken(axes: Axes, record: Record, sources: Sources, ends: np.ndarray) -> None:
    canvas.style(axes, y="tokens taken")
    canvas.token_axis(axes, record, names=False)
    dashes = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
    for i, name in enumerate(sources.names):
        axes.plot(ends, sources.tokens[:, i], color=_COLOURS[i % 8], linewidth=2, linestyle=dashes[i % 4], label=name)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(decimal))


def _packing(axes: Axes, record: Record, sources: Sources, ends: np.ndarray) -> None:
    """The part of each step's rows that documents fill."""
    canvas.style(axes, x=TOKENS, y="filled by documents")
    canvas.token_axis(axes, record, names=False)
    canvas.by_stage(axes, ends, sources.efficiency, record.training.stage[sources.line], linewidth=1.4)
    axes.axhline(1, color=INK, linewidth=0.8)
    low = float(sources.efficiency.min())
    axes.set_ylim(min(0.98, low - 0.1 * (1 - low)), 1 + 0.05 * max(0.02, 1 - low))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
