"""What all plots of the report share: paper, colours, stage bands, axis numbers. Only matplotlib's objects, never its global state."""

from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from minimax_train.report.record import Record
from minimax_train.report.words import binary, decimal

# Okabe and Ito's colours, told apart by colour-blind readers; shape and dash say the same again.
BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#C44500", "#009E73"
INK, SOFT, RULE = "#1f2933", "#52606d", "#d9dee5"
BANDS = ("#eef4fa", "#faf5ea")
WIDTH = 9.6  # inches; the page shows 100 CSS pixels per inch, so 10 pt here reads as 14 px there
_CHARACTER = 0.088  # inches, an average 10 pt character


def sheet(height: float, title: str) -> Figure:
    """A white figure, `height` inches high, with nothing but `title` in it (any characters: $ is no mathematics)."""
    figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05))  # inches: room for a marker on the last token
    FigureCanvasAgg(figure)
    figure.suptitle(fit(100, title), x=0.005, ha="left", fontsize=11, color=SOFT, parse_math=False)
    return figure


def style(axes: Axes, *, x: str = "", y: str = "") -> None:
    """Quiet frame, grid and labels for `axes`."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa5b1")
    axes.tick_params(labelsize=10, colors=SOFT, labelcolor=INK)
    axes.grid(True, axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, fontsize=10.5, color=INK)
    axes.set_ylabel(y, fontsize=10.5, color=INK)


def heading(axes: Axes, text: str, size: float = 11) -> None:
    """A left-aligned title; `text` may hold any characters ($ is no mathematics)."""
    axes.set_title(text, loc="left", fontsize=size, color=INK, parse_math=False)


def legend(figure: Figure | SubFigure, axes: Axes) -> None:
    """The legend of `axes` in one row below all axes of `figure`, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=10, frameon=False, labelcolor=INK)


def token_axis(axes: Axes, record: Record, *, names: bool) -> None:
    """Tokens on x from the first to the last, one band per stage; with `names`, each stage's name and length above its band."""
    spans = [(stage, span) for i, stage in enumerate(record.stages) if (span := record.span(i))]
    if spans:
        first, last = spans[0][1][0], max(spans[-1][1][1], spans[0][1][0] + 1)
        axes.set_xlim(first, last)
    for i, (stage, (begin, end)) in enumerate(spans):
        axes.axvspan(begin, end, color=BANDS[i % 2], linewidth=0, zorder=0)
        if i:
            axes.axvline(begin, color="#9aa5b1", linewidth=1, zorder=1)
        room = int(WIDTH * 0.88 * (end - begin) / (last - first) / _CHARACTER)
        if names and room >= 2:
            label = "\n".join((fit(room, stage.name), fit(room, f"length {stage.length:,}", f"{stage.length:,}", binary(stage.length))))
            middle, paper = (begin + end) / 2, axes.get_xaxis_transform()
            axes.text(middle, 1.02, label, transform=paper, ha="center", va="bottom", fontsize=10, color=SOFT, parse_math=False)
    axes.xaxis.set_major_formatter(FuncFormatter(decimal))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))


def fit(room: int, *forms: str) -> str:
    """The first of `forms` of at most `room` characters, else the last one cut short."""
    return next((form for form in forms if len(form) <= room), forms[-1][: max(room - 1, 1)] + "…")


def mark_non_finite(axes: Axes, x: np.ndarray, y: np.ndarray, name: str) -> None:
    """A cross at the top edge for each x where y is NaN or infinite."""
    bad = ~np.isfinite(y)
    if bad.any():
        label = f"{name} not finite ({int(bad.sum())})"
        paper = axes.get_xaxis_transform()
        axes.plot(x[bad], np.full(bad.sum(), 0.97), "x", transform=paper, color=VERMILION, ms=8, mew=2.2, label=label, clip_on=False)


def smooth(y: np.ndarray, stage: np.ndarray, window: int) -> np.ndarray:
    """`[N]` centred mean of the finite values among up to `window` (odd) neighbours of the same stage; NaN where there is none."""
    result = np.full(y.shape, np.nan)
    for number in np.unique(stage):
        mine = np.flatnonzero(stage == number)
        finite = np.isfinite(y[mine])
        total = np.concatenate(([0.0], np.cumsum(np.where(finite, y[mine], 0.0))))
        count = np.concatenate(([0], np.cumsum(finite)))
        place = np.arange(mine.size)
        reach = np.minimum(np.minimum(place, place[::-1]), window // 2)  # the same to both sides, or a slope bends at its ends
        low, high = place - reach, place + reach + 1
        with np.errstate(invalid="ignore"):
            result[mine] = (total[high] - total[low]) / (count[high] - count[low])
    return result


def window_for(steps: int) -> int:
    """The odd width, in steps, to smooth a run of `steps` with: about a fortieth, 1 (nothing) for short runs."""
    return 1 if steps < 40 else 2 * (steps // 80) + 3


def raw_and_smooth(axes: Axes, x: np.ndarray, y: np.ndarray, stage: np.ndarray, name: str) -> None:
    """`y` thin, and its smoothed line over it, broken between stages; y values that are not finite leave gaps."""
    window = window_for(x.size)
    if window == 1:
        by_stage(axes, x, y, stage, label=f"{name}, each step", linewidth=1.6)
        return
    by_stage(axes, x, y, stage, label=f"{name}, each step", linewidth=0.8, alpha=0.45)
    by_stage(axes, x, smooth(y, stage, window), stage, label=f"{name}, mean of {window:,} steps", linewidth=2.2)


def by_stage(axes: Axes, x: np.ndarray, y: np.ndarray, stage: np.ndarray, *, label: str = "", linewidth: float, alpha: float = 1) -> None:
    """A blue line of `y`, broken between stages and where `y` is not finite; a point where a stage has but one step."""
    values = np.where(np.isfinite(y), y, np.nan)
    for i, number in enumerate(np.unique(stage)):
        mine = stage == number
        marker = "o" if mine.sum() == 1 else ""
        axes.plot(
            x[mine],
            values[mine],
            color=BLUE,
            marker=marker,
            ms=4,
            label=label if label and not i else None,
            linewidth=linewidth,
            alpha=alpha,
        )


def png(figure: Figure) -> bytes:
    """`figure` as PNG; the same figure gives the same bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
