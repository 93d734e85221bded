"""Loss by position in the document, before and after a stage: what evaluation/positions.json holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class PositionLosses:
    """One extension stage, same held-out documents and the new RoPE base in both; losses in nats per token.

    `before`: weights at the end of the previous stage; `after`: at the end of this one. Arrays float64; bins without tokens are NaN.
    """

    stage: str
    previous_length: int
    length: int
    rope_base: float
    documents: int
    tokens: int
    edges: np.ndarray  # [n + 1], positions, rising
    count: np.ndarray  # [n], tokens in a bin
    before: np.ndarray  # [n]
    after: np.ndarray  # [n]
    inside_before: float | None  # None: not measured; positions below previous_length
    inside_after: float | None
    beyond_before: float | None  # positions from previous_length on
    beyond_after: float | None


def read_positions(value: Any, path: Path) -> tuple[PositionLosses, ...] | None:
    """The stages in the parsed positions.json `value`; None for None. Raises ValueError naming `path`, stage and what does not fit."""
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("stages"), list):
        raise ValueError(f"{path} has no list 'stages': write it again with `minimax-train evaluate positions RUN`")
    stages = []
    for number, stage in enumerate(value["stages"]):
        try:
            stages.append(_stage(stage))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"missing key {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} stages[{number}]: {reason}: write it again with `minimax-train evaluate positions RUN`") from error
    return tuple(stages)


def _stage(stage: dict[str, Any]) -> PositionLosses:
    edges, count, before, after = (np.array(stage[key], dtype=np.float64) for key in ("edges", "count", "before", "after"))
    if edges.ndim != 1 or edges.size < 2 or not (np.diff(edges) > 0).all():
        raise ValueError("'edges' must be at least two rising positions")
    for key, array in (("count", count), ("before", before), ("after", after)):
        if array.shape != (edges.size - 1,):
            raise ValueError(f"{key!r} has shape {array.shape}, but {edges.size} edges make {edges.size - 1} bins")
    empty = count <= 0
    return PositionLosses(
        stage=str(stage["stage"]),
        previous_length=int(stage["previous_length"]),
        length=int(stage["length"]),
        rope_base=float(stage["rope_base"]),
        documents=int(stage["documents"]),
        tokens=int(stage["tokens"]),
        edges=edges,
        count=count,
        before=np.where(empty, np.nan, before),
        after=np.where(empty, np.nan, after),
        inside_before=_loss(stage, "inside", "before"),
        inside_after=_loss(stage, "inside", "after"),
        beyond_before=_loss(stage, "beyond", "before"),
        beyond_after=_loss(stage, "beyond", "after"),
    )


def _loss(stage: dict[str, Any], where: str, when: str) -> float | None:
    value = stage[where][when]
    return None if value is None else float(value)


def coarser(stage: PositionLosses, *, per_octave: int = 6) -> PositionLosses:
    """`stage` with neighbouring bins merged until each spans 1/`per_octave` of a doubling (or is the first); losses weighted by tokens.

    Equal-width bins crowd at the right of a logarithmic axis; merging keeps every token and its weight. No merged bin crosses
    `previous_length` if no bin did.
    """
    starts = [0]
    for i in range(1, stage.count.size):
        left, right = stage.edges[starts[-1]], stage.edges[i]
        if right >= max(left, 1) * 2 ** (1 / per_octave) or right == stage.previous_length:
            starts.append(i)
    count = np.add.reduceat(stage.count, starts)
    with np.errstate(invalid="ignore"):
        before, after = (
            np.add.reduceat(np.where(stage.count > 0, loss * stage.count, 0.0), starts) / count for loss in (stage.before, stage.after)
        )
    edges = np.append(stage.edges[starts], stage.edges[-1])
    return PositionLosses(**vars(stage) | {"edges": edges, "count": count, "before": before, "after": after})
