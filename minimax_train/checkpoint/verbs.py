"""What the command line's `checkpoint` verbs do and print."""

import json
import sys
from pathlib import Path
from threading import Lock

from minimax_train.checkpoint.copies import copy_checkpoint
from minimax_train.checkpoint.manifest import NewerFormat, damage, listed
from minimax_train.checkpoint.mirror import mirror_of
from minimax_train.checkpoint.record import read_record
from minimax_train.checkpoint.repair import repair
from minimax_train.checkpoint.shelf import checkpoints_in, newest_verified, no_folder, resolve
from minimax_train.train.folder import RunFolder, owned


def tell_all(path: Path, *, as_json: bool) -> bool:
    """Reads every checkpoint of a run, or the one given, and prints a line for each; whether all are intact. ValueError where there is
    none."""
    inside = path / "checkpoints"
    found = checkpoints_in(inside) if inside.is_dir() else [path] if (path / "checkpoint.json").is_file() else []
    if not found:
        raise ValueError(f"{path} is neither a run with checkpoints nor a checkpoint")
    told, intact = [], True
    for checkpoint in found:
        try:
            wrong = damage(checkpoint)
        except NewerFormat as error:
            wrong = str(error)
        intact = intact and wrong is None
        if wrong is None:
            record = read_record(checkpoint)
            about, tokens, ends = "intact", record.progress.tokens, record.stage_end
            if not as_json:
                print(f"{checkpoint}: {about}, {tokens:,} tokens{', the end of a stage' if ends else ''}", flush=True)
            told.append({"checkpoint": str(checkpoint), "intact": True, "tokens": tokens, "stage_end": ends})
        else:
            if not as_json:
                print(f"{checkpoint}: {wrong}", flush=True)
            told.append({"checkpoint": str(checkpoint), "intact": False, "wrong": wrong})
    if as_json:
        print(json.dumps(told, indent=1))
    return intact


def copy(path: Path, final: Path) -> None:
    """Copies a checkpoint, or a run's newest that verifies, and prints how far it is."""
    source, done, lock = resolve(path), 0, Lock()
    if not source.is_dir():
        raise no_folder(source)
    whole = 2 * sum(size for size, _ in listed(source).values())  # read, and read back

    def tell(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            print(f"{source}: {min(done / max(whole, 1), 1):.0%}", flush=True)

    copy_checkpoint(source, final, tell)
    print(f"{final}: intact")


def repair_run(run: Path, copies: Path | None) -> bool:
    """Repairs a run from `copies`, or from its plan's mirror, and prints what was done; whether its newest checkpoint is intact now."""
    folder = RunFolder(run).require()
    if copies is not None:
        copies = copies / "checkpoints" if (copies / "checkpoints").is_dir() else copies
        if not checkpoints_in(copies):
            raise ValueError(f"--from {copies} has no checkpoints: give a run, or the folder in which step-... lie")
    else:
        copies = mirror_of(folder.load_plan().checkpoints, run)
    with owned(run):
        for line in repair(folder.checkpoints, copies):
            print(line, flush=True)
        newest, passed = newest_verified(folder.checkpoints)
    if newest is None:
        print(f"minimax-train: no checkpoint of {run} is intact", file=sys.stderr)
        return False
    print(f"the newest that verifies: {newest}")
    return not passed
