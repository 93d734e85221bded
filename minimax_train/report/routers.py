"""The routers' figures by layer, as training lines hold them under `router`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NAMES = ("entropy", "load_entropy", "load_max", "dropped")


@dataclass(frozen=True, kw_only=True)
class Routers:
    """Of the M training lines that have them, in step order: arrays `[M, layers]`, and the index of each line among all training lines."""

    line: np.ndarray  # int64
    entropy: np.ndarray  # of the probabilities of a token, nats, mean over tokens
    load_entropy: np.ndarray  # of the experts' shares, nats: log(experts) at balance
    load_max: np.ndarray  # largest share times number of experts
    dropped: np.ndarray  # fraction of choices


def read_router(value: Any, where: str) -> np.ndarray:
    """One line's figures `[4, layers]`, in the order of NAMES. Raises ValueError naming `where` when they are not lists of one length."""
    try:
        figures = np.array([value[name] for name in NAMES], dtype=np.float64)
        if figures.ndim != 2 or not figures.size:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where}: 'router' must hold {', '.join(NAMES)}: each a list of numbers, one per layer") from None
    return figures


def collect_routers(lines: Sequence[np.ndarray | None]) -> Routers | None:
    """What the training lines have, None where none has any; lines of another number of layers than the last one's are left out."""
    last = next((figures for figures in reversed(lines) if figures is not None), None)
    if last is None:
        return None
    kept = {i: figures for i, figures in enumerate(lines) if figures is not None and figures.shape == last.shape}
    stacked = np.stack(list(kept.values()), axis=1)
    return Routers(line=np.array(list(kept), dtype=np.int64), **dict(zip(NAMES, stacked, strict=True)))
