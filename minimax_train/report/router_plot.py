"""The plot of what routers do in each layer over training."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minimax_train.report import canvas
from minimax_train.report.canvas import INK, VERMILION
from minimax_train.report.plots import TOKENS, Plot
from minimax_train.report.record import Record
from minimax_train.report.routers import Routers

_COLUMNS = 400  # more steps than a map can show are averaged


def router_plot(record: Record) -> Plot:
    """Maps of layers by tokens: entropy of the routers, entropy of the load; below, what was dropped, where anything was."""
    title, routers = "Routers by layer", record.routers
    if routers is None:
        return Plot(name="routers", title=title, caption="", absent="no line of metrics.jsonl has the routers' figures.")
    load = record.validation.expert_load
    even = math.log(load.shape[1]) if load is not None else math.nan
    dropped = bool((routers.dropped > 0).any())
    heights = (3.3, 3.3, 2.8) if dropped else (3.3, 3.3)
    figure = canvas.sheet(sum(heights), f"{record.name}: {title.lower()}")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    at_most = f"; log(experts) is {even:.2f}" if math.isfinite(even) else ""
    _map(parts[0], record, routers, routers.entropy, f"Entropy of a token's probabilities, nats{at_most}", even)
    _map(parts[1], record, routers, routers.load_entropy, f"Entropy of the experts' load, nats{at_most}", even)
    if dropped:
        _dropped(parts[2], record, routers)
    last = {name: getattr(routers, name)[-1] for name in ("entropy", "load_entropy", "dropped")}
    return Plot(
        name="routers",
        title=title,
        figure=figure,
        alt=f"Heat maps of {routers.entropy.shape[1]} layers by training tokens. At the end the routers' entropies are "
        f"{last['entropy'].min():.2f} to {last['entropy'].max():.2f} nats, those of the load {last['load_entropy'].min():.2f} to "
        f"{last['load_entropy'].max():.2f}; {last['dropped'].mean():.1%} of the choices are dropped.",
        caption="A router that knows nothing has entropy log(experts), a certain one 0. The load's is log(experts) when all experts get "
        "the same, before any choice is dropped; a layer that turns dark there is collapsing onto few experts.",
    )


def _map(figure: SubFigure, record: Record, routers: Routers, values: np.ndarray, title: str, even: float) -> None:
    """Heat map `[layers, steps]` over tokens."""
    axes = figure.add_subplot()
    canvas.style(axes, x=TOKENS, y="layer")
    axes.grid(False)
    canvas.token_axis(axes, record, names=False)
    canvas.heading(axes, title)
    ends = record.training.tokens[routers.line]
    groups = np.array_split(np.arange(len(ends)), min(len(ends), _COLUMNS))
    edges = np.array([_begin(record, routers), *(ends[group[-1]] for group in groups)])
    columns = np.stack([values[group].mean(axis=0) for group in groups], axis=1)
    low = float(np.nanmin(columns, initial=even if math.isfinite(even) else np.inf))
    high = even if math.isfinite(even) else float(np.nanmax(columns, initial=-np.inf))
    layers = np.arange(columns.shape[0] + 1) - 0.5
    mesh = axes.pcolormesh(edges, layers, columns, cmap="viridis", vmin=min(low, high - 1e-3), vmax=high, zorder=0.5)
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=14)
    bar.set_label("nats", fontsize=10.5, color=INK)
    bar.ax.tick_params(labelsize=9.5, labelcolor=INK)


def _begin(record: Record, routers: Routers) -> float:
    first = int(routers.line[0])
    return float(record.training.tokens[first - 1]) if first else record.first_token


def _dropped(figure: SubFigure, record: Record, routers: Routers) -> None:
    axes: Axes = figure.add_subplot()
    canvas.style(axes, x=TOKENS, y="choices dropped")
    canvas.token_axis(axes, record, names=False)
    tokens, stage = record.training.tokens[routers.line], record.training.stage[routers.line]
    canvas.raw_and_smooth(axes, tokens, routers.dropped.mean(axis=1), stage, "mean of layers")
    axes.plot(tokens, routers.dropped.max(axis=1), color=VERMILION, linewidth=1, linestyle=(0, (4, 2)), label="the layer that drops most")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    canvas.legend(figure, axes)
