"""What a checkpoint says about itself, in `checkpoint.json`: enough to load it without the run that wrote it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data.sampler import Bookmark
from minimax_train.model.config import ModelConfig
from minimax_train.plan import Precision

NAME = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: everything resuming needs besides weights and moments."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    step: int = 0
    """Optimizer steps of the run."""
    stage: int = 0
    """Index of the stage the next step belongs to."""
    stage_step: int = 0
    """Steps already taken in that stage."""
    tokens: int = 0
    """Tokens of all global batches so far."""
    sources: dict[str, Bookmark] = field(default_factory=dict)
    """Where each source of training rows stands; empty before the first step."""
    norms: tuple[float, ...] = ()
    """Gradient norms of the stage's last steps that were applied, for the guard."""
    losses: tuple[float, ...] = ()
    """And their losses."""
    refused: int = 0
    """Steps in a row, the last ones, that the guard did not apply."""
    rewinds: int = 0
    """Times that the run went back to a checkpoint in this stage."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Facts of one checkpoint."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    model: ModelConfig
    rope_base: float
    """The base its weights were last trained with."""
    max_positions: int
    """The longest row trained so far, or what the imported config.json said (max_position_embeddings)."""
    precision: Precision
    progress: Progress
    optimizer_steps: int | None
    """Adam's own count; None where the checkpoint holds weights only."""
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    """Of each source's token file; empty where it was converted."""
    stage_end: bool = False
    """Kept for ever: evaluations compare the ends of stages."""


def write_record(folder: Path, record: Record) -> None:
    """Writes `checkpoint.json`."""
    (folder / NAME).write_text(json.dumps(asdict(record), indent=1))


def read_record(folder: Path) -> Record:
    """Reads it back; ValueError where it is of another version."""
    text = (folder / NAME).read_text()
    try:
        return TypeAdapter(Record).validate_json(text)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise ValueError(f"{folder / NAME} was written by another version (it differs in {fields})") from None


def model_differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Every field in which two architectures differ, as `name: theirs -> ours`."""
    mine, other = _plain(ours), _plain(theirs)
    return [f"{name}: {other[name]} -> {mine[name]}" for name in mine if mine[name] != other[name]]


def _plain(config: ModelConfig) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
