"""A checkpoint as something to read tensor by tensor: whatever layout of ranks wrote it, and without a model in memory."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from minimax_train.checkpoint.manifest import Damage, damage_of, listed
from minimax_train.checkpoint.record import NAME as RECORD
from minimax_train.checkpoint.record import Record, read_record
from minimax_train.checkpoint.shelf import TENSORS
from minimax_train.convert.carried import FOLDER
from minimax_train.convert.cast import dtype_of
from minimax_train.convert.pieces import Piece
from minimax_train.convert.source import some
from minimax_train.convert.table import Entry, table
from minimax_train.convert.work import Job
from minimax_train.engine.torch_dist import METADATA, OWN_FILES, Reader, Stored, read_index


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """The weights of a checkpoint: what its small files say, their checksums verified; those of the large ones are `checks`."""

    folder: Path
    record: Record
    stored: dict[str, Stored]
    listed: dict[str, tuple[int, str]]

    @classmethod
    def open(cls, checkpoint: Path) -> "StoredModel":
        """ValueError, naming what, where the checkpoint is damaged or lacks a weight of its own architecture."""
        if not checkpoint.is_dir():
            raise ValueError(f"{checkpoint} is not a checkpoint: no such folder")
        try:
            files = listed(checkpoint)
        except Damage as error:
            raise _damaged(checkpoint, str(error)) from None
        small = [RECORD, *(f"{TENSORS}/{name}" for name in (METADATA, *OWN_FILES)), *(n for n in files if n.startswith(f"{FOLDER}/"))]
        for name in small:
            if name not in files:
                raise _damaged(checkpoint, f"{name} is missing")
            if wrong := damage_of(checkpoint, name, files[name]):
                raise _damaged(checkpoint, wrong)
        record, index = read_record(checkpoint), read_index(checkpoint / TENSORS)
        stored: dict[str, Stored] = {}
        for entry in table(record.model):
            found, dtype = index.get(f"model.{entry.name}"), dtype_of(entry, record.precision)
            if found is None or (found.shape, found.dtype) != (entry.shape, dtype):
                has = "lacks" if found is None else f"has {list(found.shape)} {found.dtype} for"
                raise ValueError(f"{checkpoint} {has} {entry.name}, needed as {list(entry.shape)} {dtype}: it is of another version")
            stored[entry.name] = found
        model = cls(folder=checkpoint, record=record, stored=stored, listed=files)
        if missing := [name for name in model.files if name not in files]:
            raise _damaged(checkpoint, f"its manifest does not list {some(missing)}")
        return model

    @property
    def files(self) -> list[str]:
        """The files that hold weights."""
        return sorted({f"{TENSORS}/{chunk.file}" for tensor in self.stored.values() for chunk in tensor.chunks})

    def times(self) -> list[list[Any]]:
        """Size and time of each: what a resumed conversion compares, for it believes the checks that were made before."""
        stats = {name: (self.folder / name).stat() for name in self.files}
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]

    def checks(self) -> list[Job]:
        """For every file that holds weights, a job that verifies its checksum. ValueError where it does not hold."""
        return [Job(name=f"check-{Path(name).name}", bytes=self.listed[name][0], run=partial(self._check, name)) for name in self.files]

    def _check(self, name: str) -> dict[str, Any]:
        if wrong := damage_of(self.folder, name, self.listed[name]):
            raise _damaged(self.folder, wrong)
        return {}

    def reader(self) -> "WeightReader":
        """A context manager that reads weights."""
        return WeightReader(self)


class WeightReader(Reader):
    """Reads pieces of a StoredModel's weights."""

    def __init__(self, model: StoredModel) -> None:
        super().__init__(model.folder / TENSORS)
        self.model = model

    def piece(self, entry: Entry, piece: Piece) -> Tensor:
        """`[rows, columns]` of a piece as it is stored."""
        axis = max(len(piece.box) - 2, 0)
        first = piece.offset[axis]
        leading = piece.offset[:-2] if len(piece.offset) > 2 else ()
        return self.rows(entry.name, self.model.stored[entry.name], leading, first, first + piece.box[axis])


def _damaged(checkpoint: Path, wrong: str) -> ValueError:
    return ValueError(f"checkpoint {checkpoint} is damaged: {wrong}; use another one")
