"""The plot of gradient norms by kind of weight, with the steps that were not applied."""

import numpy as np

from minimax_train.report import canvas
from minimax_train.report.canvas import BLUE, GREEN, INK, ORANGE, VERMILION
from minimax_train.report.plots import TOKENS, Plot
from minimax_train.report.record import Record

_COLOURS = {
    "lightning_early": BLUE, "lightning_late": "#56B4E9", "softmax": VERMILION, "experts": ORANGE, "routers": "#CC79A7",
    "norms": "#8a8f98", "embedding": GREEN, "head": INK,
}  # fmt: skip
_DASHED = ("lightning_late", "routers", "norms", "head")
_SHOWN = 3
"""Refused steps whose reason the caption gives."""


def gradient_plot(record: Record) -> Plot:
    """Norms on a logarithmic axis; a cross at the top for each refused step."""
    title, gradients = "Gradient norms by kind of weight", record.gradients
    if gradients is None:
        return Plot(name="gradients", title=title, caption="", absent="no line of metrics.jsonl has gradient norms by kind.")
    figure = canvas.sheet(5.2, f"{record.name}: {title.lower()}")
    axes = figure.add_subplot()
    canvas.style(axes, x=TOKENS, y="gradient norm, before clipping")
    canvas.token_axis(axes, record, names=True)
    tokens = record.training.tokens[gradients.line]
    for kind, norms in zip(gradients.kinds, gradients.norms.T, strict=True):
        positive = np.where(norms > 0, norms, np.nan)
        style = (0, (5, 2)) if kind in _DASHED else "-"
        axes.plot(tokens, positive, color=_COLOURS.get(kind, INK), linestyle=style, linewidth=1.3, label=kind.replace("_", ", "))
    if (gradients.norms > 0).any():
        axes.set_yscale("log")
    if gradients.refused:
        places = record.training.tokens[[line for line, _ in gradients.refused]]
        axes.plot(
            places, np.full(len(places), 0.97), "x", transform=axes.get_xaxis_transform(), color=VERMILION, ms=8, mew=2, label="not applied"
        )  # fmt: skip
    canvas.legend(figure, axes)
    reasons = "; ".join(f"step {record.training.step[line]}: {reason}" for line, reason in gradients.refused[:_SHOWN])
    more = f"; and {len(gradients.refused) - _SHOWN} more" if len(gradients.refused) > _SHOWN else ""
    refused = (
        f"The guard did not apply {len(gradients.refused)} steps ({reasons}{more})." if gradients.refused else "Every step was applied."
    )
    if gradients.rewound:
        for line, _ in gradients.rewound:
            axes.axvline(record.training.tokens[line], color=VERMILION, linewidth=1, linestyle=":")
        refused += f" The run {'; '.join(said for _, said in gradients.rewound)} (dotted). The rows read in between were left out."
    ends = ", ".join(f"{kind} {norm:.3g}" for kind, norm in zip(gradients.kinds, gradients.norms[-1], strict=True))
    return Plot(
        name="gradients",
        title=title,
        figure=figure,
        alt=f"Lines of the gradient norm of each kind of weight over training tokens. At the end: {ends}. {refused}",
        caption=f"Early lightning layers are those of the first half, which forget faster. {refused}",
    )
