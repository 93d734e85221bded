"""The timeline of context_trace.py: what one rank computed, and which exchanges were under way."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from trace_reader import FINISH, MODULE, NODE, Event, Exchange, Trace

from minimax_train.report import canvas
from minimax_train.report.canvas import BLUE, GREEN, INK, ORANGE, SOFT, VERMILION

LANES = {"compute": 2.0, "states": 1.0, "keys, values": 0.0}
HIGH = 0.72
LAYERS = {"other": 2, "backward": 3, "module": 3, "waits": 4}
"""What lies over what."""
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
COLORS = {"module": BLUE, "backward": GREEN, "other": "#b8c2cc", "waits": VERMILION, "exchange": ORANGE}


def draw(trace: Trace) -> bytes:
    """PNG: the whole step, and close up the last lightning layer with the softmax layer, forward and backward."""
    figure = canvas.sheet(8.0, "Rank 0 of 4 gloo context ranks, one training step of the tiny model: the order of the schedule")
    axes = figure.subplots(3, 1)
    ring = [e for e in trace.exchanges if e.name.startswith("ring")]
    softmax = ring[0].layer
    last = str(int(softmax) - 1)
    states = {e.backward: e for e in trace.exchanges if e.name == "states" and e.layer == last}
    ends = max(e.end for e in trace.nodes)
    modules = [m for m in trace.modules if m.name.startswith(f"{MODULE}layer {softmax} ")]
    forward = states[False].begun, next(m.end for m in modules if m.name.endswith("o_proj"))
    backward = min(e.begun for e in ring if e.backward), max(e.finished for e in trace.exchanges if e.layer == last and e.backward)
    _panel(axes[0], trace, (0.0, ends), "The whole step, without the optimizer", labels=False)
    _panel(axes[1], trace, forward, f"Forward: lightning layer {last}, then softmax layer {softmax}", labels=True)
    _panel(axes[2], trace, backward, f"Backward: softmax layer {softmax}, then lightning layer {last}", labels=True)
    axes[2].set_xlabel("milliseconds from the beginning of the step", fontsize=10.5, color=INK)
    names = ("forward", "backward", "other operators", "the thread waits", "exchange under way")
    handles = [Patch(color=color, label=name) for color, name in zip(COLORS.values(), names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=10, frameon=False, labelcolor=INK)
    return canvas.png(figure)


def _panel(axes: Axes, trace: Trace, span: tuple[float, float], title: str, *, labels: bool) -> None:
    margin = 0.01 * (span[1] - span[0])
    low, high = span[0] - margin, span[1] + margin
    canvas.style(axes)
    canvas.heading(axes, title)
    axes.grid(False)
    axes.set_xlim(low, high)
    axes.set_ylim(-0.5, 2.5)
    axes.set_yticks(list(LANES.values()), list(LANES))
    for event in trace.events:
        kind = _kind(event)
        if kind and event.end > low and event.start < high:
            _bar(axes, event, COLORS[kind], layer=LAYERS[kind])
            waits = any(event.start < wait.start < event.end for wait in trace.waits)
            if labels and kind in ("module", "backward") and not waits:
                _write(axes, trace.label(event), event, (low, high))
    for exchange in trace.exchanges:
        if exchange.end > low and exchange.begun < high:
            _exchange(axes, exchange, trace.waits, labels=labels)


def _kind(event: Event) -> str | None:
    if event.name.endswith(FINISH):
        return "waits"
    if ATTENTION in event.name:
        return "backward" if event.name.endswith("backward") else "module"
    if event.name.startswith(MODULE):
        return "module"
    if event.name.startswith(NODE):
        return "backward"
    return "other" if event.name.startswith("aten::") or event.name.startswith("_") else None


def _bar(axes: Axes, event: Event, color: str, *, layer: int) -> None:
    box, edge = (LANES["compute"] - HIGH / 2, HIGH), 0.4 if layer > 2 else 0
    axes.broken_barh([(event.start, event.end - event.start)], box, facecolor=color, edgecolor="white", linewidth=edge, zorder=layer)


def _exchange(axes: Axes, exchange: Exchange, waits: Sequence[Event], *, labels: bool) -> None:
    lane = "keys, values" if exchange.name.startswith("ring") else "states"
    shift = 0.2 if exchange.name in ("ring gradients", "states back") else -0.2 if lane == "keys, values" else 0.0
    middle, height = LANES[lane] + shift, HIGH / 2
    axes.broken_barh([(exchange.begun, exchange.lasted)], (middle - height / 2, height), facecolor=COLORS["exchange"], zorder=2)
    for wait in waits:
        start, end = max(exchange.begun, wait.start), min(exchange.end, wait.end)
        if end > start:
            axes.broken_barh([(start, end - start)], (middle - height / 2, height), facecolor=COLORS["waits"], zorder=3)
    if labels:
        axes.plot([exchange.begun] * 2, [middle - height / 2, LANES["compute"] - HIGH / 2], color=SOFT, linewidth=0.7, zorder=1)


def _write(axes: Axes, label: str, event: Event, span: tuple[float, float]) -> None:
    """A name in its bar, where there is room."""
    room = canvas.WIDTH * 0.85 * (event.end - event.start) / (span[1] - span[0])
    text = "attention" if label.startswith("_scaled") else label.removeprefix("layer ").removesuffix(", backward")
    if room > 0.075 * len(text):
        axes.text(
            (event.start + event.end) / 2,
            LANES["compute"],
            text,
            ha="center",
            va="center",
            fontsize=8,
            color="white",
            zorder=5,
            clip_on=True,
        ).set_in_layout(False)
