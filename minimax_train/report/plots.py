"""The plots over a run's tokens: loss, expert load, throughput, gradient norm and learning rate."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from minimax_train.report import canvas
from minimax_train.report.canvas import GREEN, INK, ORANGE, VERMILION
from minimax_train.report.record import Record
from minimax_train.report.summary import Summary
from minimax_train.report.words import decimal, nats

TOKENS = "tokens trained on (K = 1,000)"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot of the page; `name` is its PNG's. Either a `figure`, or None and `absent` says why there is none."""

    name: str
    title: str
    caption: str
    alt: str = ""
    figure: Figure | None = None
    absent: str = ""


def loss_plot(record: Record, summary: Summary) -> Plot:
    """Training loss (each step and smoothed), validation loss, unigram entropy, stages as bands."""
    title = "Loss by token"
    training, validation = record.training, record.validation
    if not training.step.size:
        return Plot(name="loss", title=title, caption="", absent="no training step yet.")
    figure = canvas.sheet(4.8, f"{record.name}: {title.lower()}")
    axes = figure.add_subplot()
    canvas.style(axes, x=TOKENS, y="loss (nats per token)")
    canvas.token_axis(axes, record, names=True)
    canvas.raw_and_smooth(axes, training.tokens, training.loss, training.stage, "training")
    if validation.step.size:
        held = np.where(np.isfinite(validation.loss), validation.loss, np.nan)
        axes.plot(
            validation.tokens, held, "D", color=ORANGE, markeredgecolor=INK, ms=6.5, label="validation", clip_on=False, zorder=5
        )  # fmt: skip
    if summary.unigram_entropy is not None:
        label = f"unigram entropy, {summary.unigram_entropy:.2f}"
        axes.axhline(summary.unigram_entropy, color=GREEN, linewidth=1.8, linestyle=(0, (6, 3)), label=label)
    canvas.mark_non_finite(axes, training.tokens, training.loss, "training loss")
    canvas.mark_non_finite(axes, validation.tokens, validation.loss, "validation loss")
    canvas.legend(figure, axes)
    return Plot(
        name="loss",
        title=title,
        figure=figure,
        alt=f"Line plot of the training loss in nats per token over {summary.tokens:,} tokens and {len(record.stages)} stages, with "
        f"validation losses as diamonds; the last validation loss is {nats(summary.validation_loss)}, the unigram entropy "
        f"{nats(summary.unigram_entropy)}.",
        caption="Training loss is on the text being trained on, at the stage's length; diamonds are held-out documents. The unigram "
        "entropy is what a model would reach that knows only how often each token occurs. The smoothed line does not cross stages.",
    )


def expert_plot(record: Record) -> Plot:
    """Load of each expert in each layer at the last validation, and the largest load over training."""
    title, training, load = "Expert load", record.training, record.validation.expert_load
    over_time = bool(np.isfinite(training.expert_load_max).any())
    heights = [height for height, there in ((4.0, load is not None), (3.2, over_time)) if there]
    if not heights:
        return Plot(name="experts", title=title, caption="", absent="no line of metrics.jsonl has an expert load.")
    figure = canvas.sheet(sum(heights), f"{record.name}: {title.lower()}")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    alt = []
    if load is not None:
        relative = load * load.shape[1]
        _load_map(
            parts[0], relative, f"Load of each expert at step {record.validation.expert_load_step:,} (validation); 1 is an even share"
        )
        low, high = (f"{extreme(relative, initial=1.0):.2f}" for extreme in (np.nanmin, np.nanmax))
        idle = int((load == 0).sum())
        alt.append(f"Heat map of {load.shape[0]} layers by {load.shape[1]} experts: loads from {low} to {high} times an even share.")
        alt.append(f"Experts without a token: {idle}.")
    if over_time:
        _largest_load(parts[-1], record)
        alt.append("Line plot of the largest expert load in any layer over training tokens.")
    return Plot(
        name="experts",
        title=title,
        figure=figure,
        alt=" ".join(alt),
        caption="Load is an expert's share of its layer's routed tokens times the number of experts: 1 is even, 0 is an expert without a "
        "token. The line is the largest load in any layer of a training step.",
    )


def _largest_load(figure: SubFigure, record: Record) -> None:
    training, axes = record.training, figure.add_subplot()
    canvas.style(axes, x=TOKENS, y="× even share")
    canvas.token_axis(axes, record, names=True)
    canvas.raw_and_smooth(axes, training.tokens, training.expert_load_max, training.stage, "largest load")
    axes.axhline(1, color=INK, linewidth=1.5, linestyle=(0, (6, 3)), label="even share")
    axes.set_ylim(bottom=0)
    canvas.legend(figure, axes)


def _load_map(figure: SubFigure, relative: np.ndarray, title: str) -> None:
    """Heat map `[layers, experts]`, white at 1; values written into the cells where there is room."""
    axes = figure.add_subplot()
    canvas.style(axes, x="expert", y="layer")
    axes.grid(False)
    canvas.heading(axes, title)
    top = max(2.0, float(np.nanmax(relative, initial=0.0)))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=top)
    image = axes.imshow(relative, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
    layers, experts = relative.shape
    axes.set_xticks(np.arange(-0.5, experts), minor=True)
    axes.set_yticks(np.arange(-0.5, layers), minor=True)
    axes.grid(True, which="minor", axis="both", color="white", linewidth=1 if layers * experts <= 1024 else 0)
    axes.tick_params(which="minor", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    if experts <= 16 and layers <= 12:
        for (layer, expert), value in np.ndenumerate(relative):
            away = abs(float(norm(value)) - 0.5) if np.isfinite(value) else 0
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=9, color="white" if away > 0.36 else INK)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=18)
    bar.set_label("× even share", fontsize=10.5, color=INK)
    bar.ax.tick_params(labelsize=9.5, labelcolor=INK)


def throughput_plot(record: Record, summary: Summary) -> Plot:
    """Tokens per second by token with each stage's mean; MFU below where it was measured."""
    title, training = "Throughput", record.training
    if not training.step.size:
        return Plot(name="throughput", title=title, caption="", absent="no training step yet.")
    mfu = bool(np.isfinite(training.mfu).any())
    figure = canvas.sheet(5.8 if mfu else 4.0, f"{record.name}: {title.lower()}")
    panels = figure.subplots(2 if mfu else 1, 1, sharex=True, squeeze=False, height_ratios=(3, 2) if mfu else None)[:, 0]
    canvas.style(panels[0], y="tokens per second", x="" if mfu else TOKENS)
    canvas.token_axis(panels[0], record, names=True)
    canvas.by_stage(panels[0], training.tokens, training.tokens_per_second, training.stage, label="each step", linewidth=1.3)
    for number, row in enumerate(summary.stages):
        span = record.span(number)
        if span and row.tokens_per_second is not None:
            label = "stage mean" if not number else None
            panels[0].hlines(row.tokens_per_second, *span, color=VERMILION, linewidth=1.8, linestyle=(0, (5, 2)), label=label, zorder=4)
    panels[0].set_ylim(bottom=0)
    panels[0].yaxis.set_major_formatter(FuncFormatter(decimal))
    canvas.legend(figure, panels[0])
    if mfu:
        canvas.style(panels[1], x=TOKENS, y="MFU")
        canvas.token_axis(panels[1], record, names=False)
        canvas.by_stage(panels[1], training.tokens, training.mfu, training.stage, linewidth=1.3)
        panels[1].set_ylim(bottom=0)
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    means = ", ".join(f"{row.name} {row.tokens_per_second:,.0f}" for row in summary.stages if row.tokens_per_second is not None)
    return Plot(
        name="throughput",
        title=title,
        figure=figure,
        alt=f"Line plot of tokens per second over training tokens{', with the model FLOPs utilization below' if mfu else ''}. "
        f"Mean tokens per second by stage: {means}.",
        caption="Over all ranks together, time in optimizer steps only: validation and checkpoints are not counted."
        + (" MFU is the share of the device's peak that the model's arithmetic uses." if mfu else ""),
    )


def optimizer_plot(record: Record) -> Plot:
    """Gradient norm before clipping, and learning rate."""
    title, training = "Gradient norm and learning rate", record.training
    if not training.step.size:
        return Plot(name="optimizer", title=title, caption="", absent="no training step yet.")
    figure = canvas.sheet(4.8, f"{record.name}: {title.lower()}")
    norm, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    canvas.style(norm, y="gradient norm")
    canvas.token_axis(norm, record, names=True)
    canvas.raw_and_smooth(norm, training.tokens, training.grad_norm, training.stage, "gradient norm")
    _log_when_wide(norm, training.grad_norm)
    canvas.mark_non_finite(norm, training.tokens, training.grad_norm, "gradient norm")
    canvas.legend(figure, norm)
    canvas.style(rate, x=TOKENS, y="learning rate")
    canvas.token_axis(rate, record, names=False)
    canvas.by_stage(rate, training.tokens, training.lr, training.stage, linewidth=1.8)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(decimal))
    finite = training.grad_norm[np.isfinite(training.grad_norm)]
    extent = f"from {finite.min():.3g} to {finite.max():.3g}" if finite.size else "never finite"
    return Plot(
        name="optimizer",
        title=title,
        figure=figure,
        alt=f"Two line plots over training tokens: the gradient norm, {extent}, and the learning rate.",
        caption="The gradient norm as the optimizer reported it at each step.",
    )


def _log_when_wide(axes: Axes, y: np.ndarray) -> None:
    """A logarithmic y axis when the positive values span more than a factor of 30, else one from zero."""
    positive = y[np.isfinite(y) & (y > 0)]
    if positive.size and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
