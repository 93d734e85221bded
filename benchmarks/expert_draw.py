"""The plot of expert_overlap.py: hidden shares, the schedule on a GPU's streams, the order on a real rank."""

from collections.abc import Sequence
from typing import Any

from expert_ranks import LAYER, PRODUCTS
from expert_schedule import COMPUTE, EXPERT, SLICES, Played
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from trace_reader import FINISH, Trace

from minimax_train.report import canvas
from minimax_train.report.canvas import BLUE, GREEN, INK, ORANGE, SOFT, VERMILION

MARKERS = {1: ("v", SOFT), 2: ("s", VERMILION), 4: ("D", GREEN), 8: ("o", BLUE)}
LANES = {COMPUTE: 2.0, SLICES: 1.0, EXPERT: 0.0}
PRODUCT_COLOURS = dict(zip(PRODUCTS, (BLUE, GREEN, "#7aa6c2"), strict=True))
EXCHANGE, WAITS = ORANGE, VERMILION
HIGH = 0.76


def draw(shares: Sequence[Any], example: Sequence[Played], trace: Trace) -> bytes:
    """PNG. `example`: forward and backward of expert 2 x tensor 2, 4 groups; `trace`: the same on gloo's rank 0."""
    figure = canvas.sheet(10.5, "Experts over ranks: what the schedule can hide, simulated, and its order on gloo ranks")
    above, below = figure.subfigures(2, 1, height_ratios=(1.0, 1.55))
    panels = above.subplots(1, 3, sharey=True)
    choices = (
        ("expert 4, forward", 0.0, "forward"), ("expert 4, backward", 0.0, "backward"),
        ("expert 2 x tensor 2, forward", 0.5, "forward"),
    )  # fmt: skip
    for axes, (title, share, way) in zip(panels, choices, strict=True):
        _hidden(axes, [one for one in shares if (one.share, one.way) == (share, way)], title)
    panels[0].set_ylabel("hidden share of the exchange", fontsize=10.5, color=INK)
    canvas.legend(above, panels[0])
    _streams(below, example, trace)
    return canvas.png(figure)


def _hidden(axes: Axes, mine: Sequence[Any], title: str) -> None:
    canvas.style(axes, x="exchange / compute of the pass")
    canvas.heading(axes, title)
    axes.plot([], [], color=SOFT, linestyle=":", linewidth=1, label="1 - 1 / groups")
    for groups, (marker, colour) in MARKERS.items():
        points = [one for one in mine if one.groups == groups]
        name = f"{groups} token group{'s' * (groups > 1)}"
        axes.plot([p.ratio for p in points], [p.hidden for p in points], marker=marker, color=colour, label=name, markersize=5)
        axes.axhline(points[0].bound, color=colour, linestyle=":", linewidth=1)
    axes.set_ylim(-0.04, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _streams(part: SubFigure, example: Sequence[Played], trace: Trace) -> None:
    axes = part.subplots(3, 1)
    titles = ("Simulated forward, expert 2 x tensor 2, 4 groups, exchange = compute", "Simulated backward, exchange = compute / 2")
    for panel, played, title in zip(axes, example, titles, strict=False):
        _lanes(panel, title)
        for bar in played.bars:
            colour = PRODUCT_COLOURS.get(bar.event.name, EXCHANGE)
            words = f"{bar.event.name if bar.event.stream == COMPUTE else bar.event.name[0]} {bar.event.number}"
            _bar(panel, bar.event.stream, bar.start, bar.end, colour, words, room=played.span)
        panel.set_xlim(0, played.span)
        panel.set_xlabel(
            "units of the pass's compute; d dispatch, g gather, s scatter, c combine, with the number of the token group",
            fontsize=9,
            color=SOFT,
        )
    _real(axes[2], trace)
    handles = [Patch(color=colour, label=name) for name, colour in PRODUCT_COLOURS.items()]
    handles += [Patch(color=EXCHANGE, label="exchange under way"), Patch(color=WAITS, label="the thread waits")]
    part.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=10, frameon=False, labelcolor=INK)


def _real(axes: Axes, trace: Trace) -> None:
    """Rank 0 of four gloo ranks."""
    _lanes(axes, "Measured: rank 0 of 4 gloo ranks, forward and backward. The order of the schedule, not the speed of a network")
    for exchange in trace.exchanges:
        if exchange.name == "counts":
            continue
        lane = SLICES if exchange.name.startswith(("gather", "scatter")) else EXPERT
        shift = 0.19 if exchange.name.startswith(("dispatch", "gather")) else -0.19
        axes.broken_barh(
            [(exchange.begun, exchange.lasted)], (LANES[lane] + shift - HIGH / 4, HIGH / 2.1), facecolor=EXCHANGE, edgecolor="white"
        )
    for event in trace.events:
        name = event.name.removeprefix(LAYER)
        if name in PRODUCTS:
            _bar(axes, COMPUTE, event.start, event.end, PRODUCT_COLOURS[name])
        elif name.endswith(FINISH):
            _bar(axes, COMPUTE, event.start, event.end, WAITS)
    axes.set_xlim(0, max(e.end for e in trace.exchanges) * 1.01)
    axes.set_xlabel("milliseconds; upper halves: dispatch and gather, lower: combine and scatter", fontsize=9, color=SOFT)


def _lanes(axes: Axes, title: str) -> None:
    canvas.style(axes)
    canvas.heading(axes, title, 10.5)
    axes.grid(False)
    axes.set_ylim(-0.5, 2.5)
    axes.set_yticks(list(LANES.values()), ["compute", "between ETP", "between EP"])


def _bar(axes: Axes, lane: str, start: float, end: float, colour: str, words: str = "", room: float = 0.0) -> None:
    axes.broken_barh([(start, end - start)], (LANES[lane] - HIGH / 2, HIGH), facecolor=colour, edgecolor="white", linewidth=0.6)
    if words and canvas.WIDTH * 0.85 * (end - start) / room > 0.06 * len(words):
        axes.text((start + end) / 2, LANES[lane], words, ha="center", va="center", fontsize=7.5, color="white")
