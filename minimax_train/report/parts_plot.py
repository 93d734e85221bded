"""The plot of loss and gradient by source and by length of document."""

import warnings

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from minimax_train.report import canvas
from minimax_train.report.canvas import BLUE, GREEN, INK, ORANGE, VERMILION
from minimax_train.report.parts import Parts
from minimax_train.report.plots import TOKENS, Plot
from minimax_train.report.record import Record
from minimax_train.report.words import decimal

_COLUMNS = 80  # steps are taken together into so many: one step's rows are few
_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, "#56B4E9", "#CC79A7", INK, "#8a8f98", "#b8860b")
_TITLES = {
    "source_loss": "loss by source",
    "length_loss": "loss by length of document",
    "source_gradient": "gradient by source",
    "length_gradient": "gradient by length of document",
}
_UNITS = {"loss": "nats per token", "gradient": "at embedded tokens, RMS"}


def parts_plot(record: Record) -> Plot:
    """Four panels: above losses, below gradients on a logarithmic axis; left by source, right by length."""
    title, parts = "Loss and gradient by source and length", record.parts
    if parts is None:
        return Plot(name="parts", title=title, caption="", absent="no line of metrics.jsonl has losses by source or length.")
    figure = canvas.sheet(7.6, f"{record.name}: {title.lower()}")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, name in zip(panels.flat, _TITLES, strict=True):
        _panel(axes, record, parts, name)
    lasts = {name: _last(parts, name) for name in _TITLES}
    return Plot(
        name="parts",
        title=title,
        figure=figure,
        alt="Four panels of lines over training tokens. At the end: "
        + "; ".join(f"{_TITLES[name]} {said}" for name, said in lasts.items()),
        caption="A document's length is what its row holds of it; a bucket is named by its longest. The gradient is that of the batch's "
        "summed loss with respect to each embedded token, which has come down through every layer: its root mean square over the tokens. "
        f"At the end: loss by source {lasts['source_loss']}; by length {lasts['length_loss']}.",
    )


def _panel(axes: Axes, record: Record, parts: Parts, name: str) -> None:
    bottom = name.endswith("gradient")
    canvas.style(axes, y=_UNITS[name.split("_")[1]], **({"x": TOKENS} if bottom else {}))
    canvas.token_axis(axes, record, names=False)
    axes.set_title(_TITLES[name], fontsize=10, loc="left")
    tokens = record.training.tokens[parts.line]
    groups = np.array_split(np.arange(len(tokens)), min(_COLUMNS, len(tokens)))
    ends = np.array([tokens[group[-1]] for group in groups])
    for number, (of, values) in enumerate(zip(parts.names[name], parts.values[name].T, strict=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of a column in which it has nothing
            means = np.array([np.nanmean(values[group]) for group in groups])
        there = np.isfinite(means)
        colour, style = _COLOURS[number % len(_COLOURS)], "-" if number < len(_COLOURS) else "--"
        axes.plot(ends[there], means[there], style, color=colour, linewidth=1.4, label=_label(name, of), marker=".", ms=3)
    if bottom and (parts.values[name] > 0).any():
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(FuncFormatter(decimal))
    if parts.names[name]:
        axes.legend(fontsize=8, frameon=False, ncols=2)


def _label(figure: str, name: str) -> str:
    return f"up to {int(name):,}" if figure.startswith("length") and name.isdigit() else name


def _last(parts: Parts, name: str) -> str:
    """The last value of each name."""
    said = []
    for of, values in zip(parts.names[name], parts.values[name].T, strict=True):
        there = values[np.isfinite(values)]
        if there.size:
            said.append(f"{_label(name, of)} {there[-1]:.3g}")
    return ", ".join(said) or "nothing"
