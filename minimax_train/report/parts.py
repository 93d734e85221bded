"""Loss and gradient by source and by length of document, as training lines hold them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FIGURES = ("source_loss", "source_gradient", "length_loss", "length_gradient")

Line = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Of the M training lines that have them, in step order; `line` is each one's index among all lines. Of each figure the names it has,
    lengths in order, and `[M, names]`, NaN where a step had nothing of one, or what it had was no number."""

    line: np.ndarray  # int64
    names: dict[str, tuple[str, ...]]
    values: dict[str, np.ndarray]


def read_parts(line: dict[str, Any], where: str) -> Line | None:
    """A training line's figures; None where it has none. Raises ValueError naming `where` when they are no numbers by name."""
    if not any(line.get(figure) for figure in FIGURES):
        return None
    try:
        return {figure: {str(name): float(value) for name, value in line.get(figure, {}).items()} for figure in FIGURES}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{where}: {', '.join(map(repr, FIGURES))} must each hold a number by name") from None


def collect_parts(lines: Sequence[Line | None]) -> Parts | None:
    """What the training lines have, None where none has any."""
    kept = {number: line for number, line in enumerate(lines) if line is not None}
    if not kept:
        return None
    names = {figure: tuple(dict.fromkeys(name for line in kept.values() for name in line[figure])) for figure in FIGURES}
    names |= {figure: tuple(sorted(names[figure], key=_size)) for figure in FIGURES if figure.startswith("length")}
    values = {
        figure: np.array([[line[figure].get(name, np.nan) for name in names[figure]] for line in kept.values()], dtype=np.float64)
        for figure in FIGURES
    }
    return Parts(
        line=np.array(list(kept), dtype=np.int64),
        names=names,
        values={figure: np.where(np.isfinite(array), array, np.nan) for figure, array in values.items()},
    )


def _size(name: str) -> float:
    return float(name) if name.isdigit() else float("inf")
