"""Going back over steps that the guard refused: weights and moments of the last good checkpoint, and the rows behind those taken since.

PaLM's remedy for spikes (arXiv 2204.02311, section 5.1): training went on from a checkpoint some 100 steps before the spike, without the
200 to 500 batches around it; the same batches at another state of the weights did no harm. How far back is `checkpoints.every_steps`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.sampler import Bookmark
from minimax_train.checkpoint.manifest import damage
from minimax_train.checkpoint.record import Progress, Record, read_record
from minimax_train.checkpoint.shelf import checkpoints_in, set_aside


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """Where a run goes on from, and what it leaves out."""

    checkpoint: Path
    record: Record
    progress: Progress
    """The checkpoint's, but for the sources: they stand where the run has come to."""
    begin: Mapping[str, Bookmark]
    """Where the sources stood at the checkpoint: the rows from here to progress.sources are left out."""
    moved: list[Path]
    """Newer checkpoints, put aside."""

    def figures(self, *, stopped: int, reason: str) -> dict[str, Any]:
        """For the line of the first step after it. `stopped`: the step it went back from."""
        rows = {name: {"from": asdict(mark), "to": asdict(self.progress.sources[name])} for name, mark in self.begin.items()}
        return {"from_step": stopped, "to_step": self.progress.step, "reason": reason, "left_out": rows}


def rewind(checkpoints: Path, progress: Progress) -> Rewind | None:
    """Chooses the newest intact checkpoint of the stage with no refused step behind it; None where there is none. First rank only.

    Newer ones, written between refused steps or damaged, are put aside: their steps will be taken again.
    """
    newer: list[Path] = []
    for checkpoint in reversed(checkpoints_in(checkpoints)):
        if damage(checkpoint) is not None:
            newer.append(checkpoint)
            continue
        record = read_record(checkpoint)
        if record.progress.stage != progress.stage:
            return None
        if record.progress.refused == 0:
            then = record.progress
            begin = then.sources or {name: Bookmark() for name in progress.sources}
            back = replace(then, sources=progress.sources, rewinds=progress.rewinds + 1)
            moved = [set_aside(path, "rewound") for path in newer]
            return Rewind(checkpoint=checkpoint, record=record, progress=back, begin=begin, moved=moved)
        newer.append(checkpoint)
    return None
