"""Gradient norms by kind of weight and steps that the guard refused, as training lines hold them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class GradientLine:
    """One training line's: the norm of each kind, why its step was not applied (None where it was), and what is said of going back to a
    checkpoint before it (None where it did not)."""

    norms: dict[str, float]
    refusal: str | None
    rewound: str | None


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of the M training lines that have them, in step order: `norms` `[M, kinds]`, NaN where a norm was no number, and each line's index
    among all lines; `refused`, the indices of the refused steps with the reason; `rewound`, those of the first steps after going back."""

    kinds: tuple[str, ...]
    line: np.ndarray  # int64
    norms: np.ndarray
    refused: tuple[tuple[int, str], ...]
    rewound: tuple[tuple[int, str], ...]


def read_gradients(line: dict[str, Any], where: str) -> GradientLine | None:
    """A training line's figures; None where it has none. Raises ValueError naming `where` when they are no norms by kind, or no reason."""
    norms, refused, rewound = line.get("grad_norms"), line.get("refused"), line.get("rewound")
    if norms is None and refused is None and rewound is None:
        return None
    try:
        figures = {str(kind): float(norm) for kind, norm in (norms or {}).items()}
        if any(norm < 0 for norm in figures.values()):
            raise ValueError
        back = None if rewound is None else f"went back from step {rewound['from_step']} to step {rewound['to_step']}: {rewound['reason']}"
        return GradientLine(norms=figures, refusal=None if refused is None else str(refused["reason"]), rewound=back)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{where}: 'grad_norms' must hold a norm by kind, 'refused' a reason, 'rewound' two steps and a reason") from None


def collect_gradients(lines: Sequence[GradientLine | None]) -> Gradients | None:
    """What the training lines have, None where none has any; lines of other kinds than the last one's are left out."""
    last = next((line for line in reversed(lines) if line is not None and line.norms), None)
    if last is None:
        return None
    kinds = tuple(last.norms)
    kept = {i: line for i, line in enumerate(lines) if line is not None and line.norms.keys() == last.norms.keys()}
    norms = np.array([[line.norms[kind] for kind in kinds] for line in kept.values()])
    return Gradients(
        kinds=kinds,
        line=np.array(list(kept), dtype=np.int64),
        norms=np.where(np.isfinite(norms), norms, math.nan),
        refused=tuple((i, line.refusal) for i, line in kept.items() if line.refusal is not None),
        rewound=tuple((i, line.rewound) for i, line in kept.items() if line.rewound is not None),
    )
