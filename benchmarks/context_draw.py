"""The plot of context_bytes.py."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from minimax_train.report import canvas
from minimax_train.report.canvas import BLUE, GREEN, INK, ORANGE, SOFT, VERMILION
from minimax_train.report.words import binary

STATES = {
    "LASP-2": ("LASP-2 (published)", SOFT, "v"),
    "gather": ("gather", VERMILION, "s"),
    "transpose": ("transpose", ORANGE, "^"),
    "pruned": ("pruned", GREEN, "D"),
    "auto": ("auto", BLUE, "o"),
}
KEYS_VALUES = {
    "ring": ("ring", VERMILION, "s"),
    "two levels, NVLink": ("two levels, in node", ORANGE, "^"),
    "two levels, between nodes": ("two levels, between", BLUE, "o"),
}


def draw(formula: Sequence[dict[str, Any]]) -> bytes:
    """PNG: bytes a rank sends for one layer against context ranks, states and keys/values; packed rows dashed."""
    figure = canvas.sheet(5.6, "MiniMax-Text-01, 1,048,576 tokens, one document or 24 packed: MB a rank sends forward, mean of ranks")
    parts = figure.subfigures(1, 2)
    for part, title, lines in (
        (parts[0], "States of a lightning layer", STATES),
        (parts[1], "Keys and values of a softmax layer", KEYS_VALUES),
    ):
        axes = part.add_subplot()
        canvas.style(axes, x="context ranks", y="MB a rank and layer")
        canvas.heading(axes, title)
        for scheme, (label, color, marker) in lines.items():
            _line(axes, formula, scheme, "one document", color=color, marker=marker, label=label)
        packed = [("auto", BLUE)] if lines is STATES else [("ring", VERMILION), ("two levels, between nodes", BLUE)]
        for scheme, color in packed:
            label = f"{lines[scheme][0]}, packed"
            _line(axes, formula, scheme, "packed", color=color, marker="", label=label, linestyle=(0, (4, 2)))
        _logarithmic(axes)
        handles, labels = axes.get_legend_handles_labels()
        part.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9.5, frameon=False, labelcolor=INK)
    return canvas.png(figure)


def _line(axes: Axes, formula: Sequence[dict[str, Any]], scheme: str, row: str, **how: Any) -> None:
    points = [(one["ranks"], one["mean"] / 1e6) for one in formula if (one["scheme"], one["row"]) == (scheme, row) and one["mean"]]
    axes.plot(*zip(*points, strict=True), linewidth=1.8, markersize=5.5, **how)


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([2**power for power in range(1, 11)])
    axes.xaxis.set_major_formatter(FuncFormatter(binary))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
