"""Damaged checkpoints of a run: made whole from copies elsewhere, or set aside."""

from pathlib import Path

from minimax_train.checkpoint.commit import remove_leftovers
from minimax_train.checkpoint.copies import copy_checkpoint
from minimax_train.checkpoint.manifest import damage
from minimax_train.checkpoint.shelf import checkpoints_in, newest_verified, set_aside


def repair(folder: Path, copies: Path | None) -> list[str]:
    """What was done to the checkpoints in `folder`, a line each. Nothing is lost: what does not verify is renamed to `damaged-...`.

    `copies`: a folder with checkpoints of the same names. One that is intact there takes the place of a damaged one, or of one that is
    missing here though it is newer than all that are. Only for the process that owns the run.
    """
    done = [f"removed {path.name}, left by a save that was not finished" for path in remove_leftovers(folder)]
    for checkpoint in checkpoints_in(folder):
        wrong = damage(checkpoint)
        if wrong is None:
            continue
        copy = copies / checkpoint.name if copies is not None else None
        usable = copy is not None and copy.is_dir() and damage(copy) is None
        aside = set_aside(checkpoint)
        done.append(f"{checkpoint.name} is damaged ({wrong}): set aside as {aside.name}")
        if copy is not None and usable:
            done.append(_bring(copy, checkpoint))
    if copies is not None:
        newest = newest_verified(folder)[0]
        for copy in checkpoints_in(copies):
            missing = not (folder / copy.name).exists() and (newest is None or copy.name > newest.name)
            if missing and damage(copy) is None:
                done.append(_bring(copy, folder / copy.name))
    return done


def _bring(copy: Path, final: Path) -> str:
    copy_checkpoint(copy, final)
    return f"{final.name} was copied from {copy.parent}"
