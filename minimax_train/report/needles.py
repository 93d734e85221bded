"""Needles found by length and depth: what evaluation/needle.json holds."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

AGAIN = "write it again with `minimax-train evaluate needle RUN`"


@dataclass(frozen=True, kw_only=True)
class TaskMap:
    """One task: arrays `[depths, lengths]`, float64, NaN where nothing was asked. Loss in nats per token of the answers."""

    task: str
    lengths: np.ndarray  # [lengths] int64, rising
    depths: np.ndarray  # [depths], rising, 0 to 1
    accuracy: np.ndarray  # of whole answers, 0 to 1
    token_accuracy: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True, kw_only=True)
class NeedleMaps:
    """All tasks, and of which weights."""

    step: int
    trained_length: int
    samples: int  # of a cell, at least
    keys: str  # hidden in multi_key: how many, or 1/N: one for each N tokens
    tasks: tuple[TaskMap, ...]


def read_needles(value: Any, path: Path) -> NeedleMaps | None:
    """The parsed needle.json `value`; None for None. Raises ValueError naming `path` and what does not fit."""
    if value is None:
        return None
    try:
        cells = list(value["cells"])
        if not cells:
            raise ValueError("'cells' is empty")
        for name in ("accuracy", "token_accuracy", "depth"):
            wrong = [cell[name] for cell in cells if not 0 <= cell[name] <= 1]
            if wrong:
                raise ValueError(f"{name!r} is {wrong[0]}; it must be from 0 to 1")
        return NeedleMaps(
            step=int(value["step"]),
            trained_length=int(value["trained_length"]),
            samples=min(int(cell["samples"]) for cell in cells),
            keys=str(value.get("keys", 4)),
            tasks=tuple(_map(task, cells) for task in dict.fromkeys(str(cell["task"]) for cell in cells)),
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"missing key {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {reason}: {AGAIN}") from error


def _map(task: str, cells: list[dict[str, Any]]) -> TaskMap:
    mine = [cell for cell in cells if cell["task"] == task]
    lengths, depths = (sorted({cell[name] for cell in mine}) for name in ("length", "depth"))
    arrays = {name: np.full((len(depths), len(lengths)), math.nan) for name in ("accuracy", "token_accuracy", "loss")}
    for cell in mine:
        for name, array in arrays.items():
            array[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell[name]
    return TaskMap(task=task, lengths=np.array(lengths, dtype=np.int64), depths=np.array(depths, dtype=np.float64), **arrays)
