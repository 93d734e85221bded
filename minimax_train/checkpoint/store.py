"""Tensors of a checkpoint: all ranks save them, each loads what it needs."""

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minimax_train.checkpoint.commit import abandon, begin, commit
from minimax_train.checkpoint.record import Record, write_record
from minimax_train.checkpoint.shelf import TENSORS
from minimax_train.engine.shard_writer import SILENT, Part, Pinned, ShardWriter, index_of
from minimax_train.engine.state import Sharded, model_state
from minimax_train.engine.storage import read_tensors
from minimax_train.engine.torch_dist import read_index, write_index
from parallel.collectives import first_does, raise_together, to_first
from parallel.groups import Groups

LOOK = 0.005
"""Seconds between two looks at a writer that is waited for."""


class Save:
    """A checkpoint that is being written while this process does something else. All ranks call its methods alike.

    `state` is kept as it is now. Then look at `busy` and `failure`; where no rank is busy and none has failed, `commit` makes it appear at
    `final`, complete; otherwise `abandon` leaves nothing.
    """

    def __init__(self, final: Path, state: Sharded, record: Record, groups: Groups, pinned: Pinned | None = None) -> None:
        """Begins. OSError on every rank where the folder cannot be made; ValueError where `final` is there already."""
        self.final, self.record, self._groups = final, record, groups
        self._folder: Path = first_does(lambda: _prepared(final), groups.world)
        self._writer = ShardWriter(state, self._folder / TENSORS, groups.rank, pinned or Pinned())

    def failure(self, silent: float = SILENT) -> str | None:
        """Why this rank's part is not written and will not be; None: it is, or is being."""
        return self._writer.failure(silent)

    @property
    def busy(self) -> bool:
        """Whether this rank's part is still being written, as `failure` found it."""
        return not self._writer.done

    def wait(self, silent: float = SILENT) -> None:
        """Returns once this rank's part is written or never will be."""
        while self.failure(silent) is None and self.busy:
            time.sleep(LOOK)

    def finish(self, silent: float = SILENT) -> None:
        """Waits and commits. OSError on every rank, and nothing left of it, where any rank's part fails."""
        self.wait(silent)
        failure = self.failure(silent)
        try:
            raise_together(None if failure is None else OSError(f"rank {self._groups.rank}: {failure}"), self._groups.world)
            self.commit()
        except OSError as error:
            self.abandon()
            raise OSError(f"checkpoint {self.final} was not written: {error}") from error

    def commit(self) -> None:
        """Where every rank's part is written. OSError on every rank, and nothing left, where the disk refuses what is left to write."""
        parts = to_first(self._writer.part(), self._groups.world)
        try:
            first_does(lambda: self._commit(parts or []), self._groups.world)
        except OSError:
            self.abandon()
            raise

    def _commit(self, parts: list[Part]) -> None:
        write_index(self._folder / TENSORS, index_of(parts))
        read_index(self._folder / TENSORS)  # every tensor is there, once
        write_record(self._folder, self.record)
        commit(self._folder, self.final, known={f"{TENSORS}/{part.file}": (part.size, part.checksum) for part in parts})

    def abandon(self) -> None:
        """Every rank ends its writer; then the first removes what all wrote."""
        self._writer.kill()
        first_does(lambda: abandon(self._folder), self._groups.world)

    def drop(self) -> None:
        """The same without a word to other ranks: this one is about to end with an error."""
        self._writer.kill()
        if self._groups.rank == 0:
            abandon(self._folder)


def _prepared(final: Path) -> Path:
    folder = begin(final)
    (folder / TENSORS).mkdir()
    return folder


def save(final: Path, state: Sharded, record: Record, groups: Groups) -> None:
    """All ranks write `state`; it appears at `final` complete or not at all. OSError on every rank where any rank's part fails."""
    Save(final, state, record, groups).finish()


def load_weights(decoder: nn.Module, checkpoint: Path, record: Record, groups: Groups) -> None:
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
