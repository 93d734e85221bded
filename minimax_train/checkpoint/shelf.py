"""Checkpoints as folders: which are there, which are intact, which stay. Reads no tensor and needs no other rank.

Layout: FOLDER/step-00000100/{manifest.json, checkpoint.json, tensors/...}. A converted checkpoint is one such folder by itself.
"""

import shutil
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from minimax_train.checkpoint.manifest import damage
from minimax_train.checkpoint.record import Record, model_differences, read_record
from minimax_train.model.config import ModelConfig

TENSORS = "tensors"


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def newest_verified(folder: Path, check: Callable[[Path], str | None] = damage) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint with which `check` finds nothing wrong, and what is wrong with every newer one."""
    return newest_of(checkpoints_in(folder), check)


def newest_of(checkpoints: list[Path], check: Callable[[Path], str | None]) -> tuple[Path | None, dict[Path, str]]:
    """The same of these, oldest first."""
    passed: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints):
        wrong = check(checkpoint)
        if wrong is None:
            return checkpoint, passed
        passed[checkpoint] = wrong
    return None, passed


def describe(passed: dict[Path, str]) -> str:
    """Damaged checkpoints and what is wrong with them, on one line."""
    return "; ".join(f"{checkpoint}: {wrong}" for checkpoint, wrong in passed.items())


def set_aside(checkpoint: Path, why: str = "damaged") -> Path:
    """Renames a checkpoint to `damaged-...` (or `why`-...): its steps will be redone under its name, and nothing is lost."""
    place = checkpoint.with_name(f"{why}-{checkpoint.name}-{uuid.uuid4().hex[:8]}")
    return checkpoint.rename(place)


def verified_record(checkpoint: Path) -> Record:
    """The record of an undamaged checkpoint; ValueError naming what is wrong."""
    if not checkpoint.is_dir():
        raise no_folder(checkpoint)
    if (wrong := damage(checkpoint)) is not None:
        raise damaged(checkpoint, wrong)
    return read_record(checkpoint)


def no_folder(checkpoint: Path) -> ValueError:
    return ValueError(f"{checkpoint} is not a checkpoint: no such folder")


def damaged(checkpoint: Path, wrong: str) -> ValueError:
    return ValueError(f"checkpoint {checkpoint} is damaged: {wrong}; use another one")


def none_verifies(run: Path, passed: dict[Path, str]) -> ValueError:
    return ValueError(f"run {run} has no checkpoint that verifies{': ' + describe(passed) if passed else ''}")


def looks_whole(checkpoint: Path) -> str | None:
    """As `damage`, from the manifest and the files' sizes alone: for who must answer at once, however large it is."""
    return damage(checkpoint, contents=False)


def resolve(path: Path, check: Callable[[Path], str | None] = damage) -> Path:
    """A checkpoint from what a user names: the folder itself, or a run, whose newest checkpoint with which `check` finds nothing wrong is
    taken."""
    if not (path / "checkpoints").is_dir():
        return path
    newest, passed = newest_verified(path / "checkpoints", check)
    if newest is None:
        raise none_verifies(path, passed)
    return newest


def check_architecture(record: Record, config: ModelConfig, checkpoint: Path) -> None:
    """ValueError listing every field in which the checkpoint's model and `config` differ."""
    different = model_differences(config, record.model)
    if different:
        raise ValueError(f"checkpoint {checkpoint} holds another architecture (checkpoint -> plan): {'; '.join(different)}")


def prune(
    folder: Path, keep: int, every_tokens: int | None = None, verified: Path | None = None, needed: Collection[Path] = ()
) -> list[Path]:
    """Removes old checkpoints. What stays: the newest `keep`, the ends of stages, the first at or beyond every multiple of `every_tokens`,
    the newest that verifies, `needed`, and what is not a plain folder of ours. `verified`: one that need not be read again to know that it
    does."""
    present = [path for path in checkpoints_in(folder) if not path.is_symlink()]
    newest, old = present[-keep:], present[:-keep]
    if not old or (verified not in newest and newest_verified(folder)[0] not in newest):
        return []
    milestones, reached = set[Path](), 0
    removed = []
    for checkpoint in present:
        try:
            record, lacking = read_record(checkpoint), looks_whole(checkpoint)
        except (OSError, ValueError):
            milestones.add(checkpoint)  # not ours to judge: `checkpoint list` shows it
            continue
        passed = record.progress.tokens // every_tokens if every_tokens else 0
        if record.stage_end or passed > reached:
            milestones.add(checkpoint)
        if not lacking:  # else the next one stays as well, in its place
            reached = max(reached, passed)
    for checkpoint in old:
        if checkpoint not in milestones and checkpoint not in needed:
            shutil.rmtree(checkpoint)  # it follows no link inside
            removed.append(checkpoint)
    return removed
