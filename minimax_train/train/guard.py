"""Whether a step's gradient is applied: not where it is no number, nor where its norm or the loss stands far out of those before it.

A figure is far out above mean + `sigmas` standard deviations of the last `window` that were applied in the stage (OLMo-core's rule, 6
over 128), and above a multiple of their mean (ours: a flat stretch has next to no deviation, and another source may have another loss).
Until `least` are known, only what is no number is refused. After `most` refused steps in a row the loop goes back to a checkpoint: see
rewind.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from minimax_train.plan import Guard

FARTHEST_NORM, FARTHEST_LOSS = 2.0, 1.5
"""Times the mean up to which no gradient norm, no loss is far out."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the guard remembers of a stage: it is part of a run's progress, so that a resumed run judges as the undisturbed one."""

    norms: tuple[float, ...] = ()
    """Gradient norms of the last steps that were applied."""
    losses: tuple[float, ...] = ()
    """And their losses."""
    refused: int = 0
    """Steps in a row that were not."""

    def judge(self, guard: Guard, loss: float, norm: float) -> str | None:
        """Why a gradient of this norm, from a batch of this loss, is not applied; None where it is."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"{name} {value}"
        if guard.sigmas is None or len(self.norms) < guard.least:
            return None
        return _far_out("gradient norm", norm, self.norms, guard.sigmas, FARTHEST_NORM) or _far_out(
            "loss", loss, self.losses, guard.sigmas, FARTHEST_LOSS
        )

    def after(self, guard: Guard, loss: float, norm: float, refusal: str | None) -> "Watch":
        """What is remembered after a step."""
        if refusal is not None:
            return Watch(norms=self.norms, losses=self.losses, refused=self.refused + 1)
        return Watch(norms=(*self.norms, norm)[-guard.window :], losses=(*self.losses, loss)[-guard.window :], refused=0)


def _far_out(name: str, value: float, known: Sequence[float], sigmas: float, farthest: float) -> str | None:
    mean, deviation = fmean(known), pstdev(known)
    if value <= max(mean + sigmas * deviation, farthest * mean):
        return None
    return f"{name} {value:.4g}; the last {len(known)} were {mean:.4g} +- {deviation:.2g}"
