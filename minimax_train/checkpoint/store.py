"""Checkpoints of a run: save one, find the newest that verifies, load it, keep the right ones.

Layout: FOLDER/step-00000100/{manifest.json, checkpoint.json, tensors/...}. A converted checkpoint is one such folder by itself.
"""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minimax_train.checkpoint.commit import abandon, begin, commit
from minimax_train.checkpoint.manifest import damage
from minimax_train.checkpoint.record import Record, model_differences, read_record, write_record
from minimax_train.engine.state import Sharded, model_state
from minimax_train.engine.storage import read_tensors, write_tensors
from minimax_train.model.config import ModelConfig
from minimax_train.model.decoder import Decoder
from parallel.collectives import first_does, raise_together
from parallel.groups import Groups

TENSORS = "tensors"


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:08d}"


def save(final: Path, state: Sharded, record: Record, groups: Groups) -> None:
    """All ranks write `state`; it appears at `final` complete or not at all. OSError on every rank where any rank's disk refuses."""
    folder = first_does(lambda: begin(final), groups.world)
    try:
        raise_together(_attempt(lambda: write_tensors(state, folder / TENSORS)), groups.world)
        first_does(lambda: _finish(folder, final, record), groups.world)
    except OSError as failure:
        raise OSError(f"checkpoint {final} was not written: {failure}") from failure
    finally:
        if groups.rank == 0:
            abandon(folder)  # nothing is there any more once it was committed


def _attempt(work: Callable[[], None]) -> OSError | None:
    try:
        work()
    except OSError as error:
        return error
    return None


def _finish(folder: Path, final: Path, record: Record) -> None:
    write_record(folder, record)
    commit(folder, final)


def checkpoints_in(folder: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def newest_verified(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose checksums hold, and what is wrong with every newer one."""
    passed: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints_in(folder)):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, passed
        passed[checkpoint] = wrong
    return None, passed


def describe(passed: dict[Path, str]) -> str:
    """Damaged checkpoints and what is wrong with them, on one line."""
    return "; ".join(f"{checkpoint}: {wrong}" for checkpoint, wrong in passed.items())


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint to `damaged-...`: its steps will be redone under its name, and nothing is lost."""
    place = checkpoint.with_name(f"damaged-{checkpoint.name}-{uuid.uuid4().hex[:8]}")
    return checkpoint.rename(place)


def verified_record(checkpoint: Path) -> Record:
    """The record of an undamaged checkpoint; ValueError naming what is wrong."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a checkpoint: no such folder")
    wrong = damage(checkpoint)
    if wrong is not None:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {wrong}; use another one")
    return read_record(checkpoint)


def resolve(path: Path) -> Path:
    """A checkpoint from what a user names: the folder itself, or a run, whose newest verified checkpoint is taken."""
    if not (path / "checkpoints").is_dir():
        return path
    newest, passed = newest_verified(path / "checkpoints")
    if newest is None:
        raise ValueError(f"run {path} has no checkpoint that verifies{': ' + describe(passed) if passed else ''}")
    return newest


def check_architecture(record: Record, config: ModelConfig, checkpoint: Path) -> None:
    """ValueError listing every field in which the checkpoint's model and `config` differ."""
    different = model_differences(config, record.model)
    if different:
        raise ValueError(f"checkpoint {checkpoint} holds another architecture (checkpoint -> plan): {'; '.join(different)}")


def load_weights(decoder: Decoder, checkpoint: Path, record: Record, groups: Groups) -> None:
    """Fills the model from a verified checkpoint of its architecture, casting where the precisions differ."""
    state = model_state(decoder, groups)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[record.precision]
    targets: dict[str, Tensor] = {name: sharded.data for name, sharded in state.items()}
    buffers = {
        name: replace(sharded, data=torch.empty_like(sharded.data, dtype=stored), dtype=stored)
        if _is_cast(name) and sharded.dtype != stored
        else sharded
        for name, sharded in state.items()
    }
    read_tensors(buffers, checkpoint / TENSORS)
    for name, target in targets.items():
        if buffers[name].data is not target:
            target.copy_(buffers[name].data)


def _is_cast(name: str) -> bool:
    """Whether a weight takes the model's precision; routers are fp32 in every checkpoint."""
    return not name.endswith("router.weight")


def prune(folder: Path, keep: int) -> list[Path]:
    """Removes old checkpoints: the newest `keep` and the ends of stages stay, and so does the newest that verifies."""
    present = checkpoints_in(folder)
    old = present[:-keep]
    if not old or newest_verified(folder)[0] not in present[-keep:]:
        return []
    removed = []
    for checkpoint in old:
        try:
            kept = read_record(checkpoint).stage_end
        except (OSError, ValueError):
            kept = True  # not ours to judge: `checkpoint list` shows it
        if not kept:
            shutil.rmtree(checkpoint)
            removed.append(checkpoint)
    return removed
