"""What each source of training rows gave, as training lines hold it under `sources` and `epochs`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class SourceLine:
    """One training line's: document tokens of the run so far and epochs, by source; and how its rows were packed."""

    tokens: dict[str, float]
    epochs: dict[str, float]
    efficiency: float
    split: float


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Of the M training lines that have them, in step order: arrays `[M, sources]` or `[M]`, and each line's index among all lines."""

    names: tuple[str, ...]
    line: np.ndarray  # int64
    tokens: np.ndarray  # document tokens since the run began
    epochs: np.ndarray  # tokens over those of the source's documents
    efficiency: np.ndarray  # document tokens of the step's rows over their tokens
    split: np.ndarray  # documents begun in the step of which a row held only a part


def read_sources(line: dict[str, Any], where: str) -> SourceLine | None:
    """A training line's figures; None where it has none. Raises ValueError naming `where` when they are no numbers by source."""
    if not line.get("sources"):
        return None
    try:
        tokens, epochs = ({str(name): float(number) for name, number in line[key].items()} for key in ("sources", "epochs"))
        if tokens.keys() != epochs.keys() or not all(math.isfinite(x) and x >= 0 for x in (*tokens.values(), *epochs.values())):
            raise ValueError
        return SourceLine(tokens=tokens, epochs=epochs, efficiency=float(line["packing_efficiency"]), split=float(line["split_documents"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where}: 'sources' and 'epochs' must hold a count by source, 'packing_efficiency' and 'split_documents' a number"
        ) from None


def collect_sources(lines: Sequence[SourceLine | None]) -> Sources | None:
    """What the training lines have, None where none has any; lines of other sources than the last one's are left out."""
    last = next((line for line in reversed(lines) if line is not None), None)
    if last is None:
        return None
    names = tuple(last.tokens)
    kept = {i: line for i, line in enumerate(lines) if line is not None and line.tokens.keys() == last.tokens.keys()}
    return Sources(
        names=names,
        line=np.array(list(kept), dtype=np.int64),
        tokens=np.array([[line.tokens[name] for name in names] for line in kept.values()]),
        epochs=np.array([[line.epochs[name] for name in names] for line in kept.values()]),
        efficiency=np.array([line.efficiency for line in kept.values()]),
        split=np.array([line.split for line in kept.values()]),
    )
