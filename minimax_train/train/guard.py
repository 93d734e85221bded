"""Whether a step's gradient is applied: not where it is no number, nor where its norm stands far out of those before it.

A norm is far out above mean + `sigmas` standard deviations of the last `window` norms that were applied in the stage (OLMo-core's rule, 6
over 128) and above twice their mean (ours: a flat stretch has next to no deviation). Until `least` norms are known, only what is no number
is refused. After `most` refused steps in a row the loop goes back to a checkpoint: see rewind.py.
"""

import math
from dataclasses import dataclass
from statistics import fmean, pstdev

from minimax_train.plan import Guard

FARTHEST = 2.0
"""Times the mean up to which no norm is far out."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the guard remembers of a stage: it is part of a run's progress, so that a resumed run judges as the undisturbed one."""

    norms: tuple[float, ...] = ()
    """Of the last steps that were applied."""
    refused: int = 0
    """Steps in a row that were not."""

    def judge(self, guard: Guard, norm: float) -> str | None:
        """Why a gradient of this norm is not applied; None where it is."""
        if not math.isfinite(norm):
            return f"gradient norm {norm}"
        if guard.sigmas is None or len(self.norms) < guard.least:
            return None
        mean, deviation = fmean(self.norms), pstdev(self.norms)
        if norm <= max(mean + guard.sigmas * deviation, FARTHEST * mean):
            return None
        return f"gradient norm {norm:.4g}; the last {len(self.norms)} were {mean:.4g} +- {deviation:.2g}"

    def after(self, guard: Guard, norm: float, refusal: str | None) -> "Watch":
        """What is remembered after a step."""
        if refusal is not None:
            return Watch(norms=self.norms, refused=self.refused + 1)
        return Watch(norms=(*self.norms, norm)[-guard.window :], refused=0)
