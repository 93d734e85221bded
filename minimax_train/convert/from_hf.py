"""Hugging Face -> checkpoint, a piece of a tensor at a time: the model is never in memory, and no layout of ranks is needed."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from minimax_train.checkpoint.manifest import write_manifest
from minimax_train.checkpoint.record import Progress, Record, read_record, write_record
from minimax_train.checkpoint.shelf import TENSORS
from minimax_train.convert import carried
from minimax_train.convert.cast import dtype_of, is_finite, precision_of
from minimax_train.convert.pieces import Piece, column_parts, pieces, ranks_of
from minimax_train.convert.shards import SHARD_BYTES, plan_shards
from minimax_train.convert.source import Source, SourceReader, open_source, some
from minimax_train.convert.table import Entry, Part
from minimax_train.convert.work import FinishedElsewhereError, Job, Work, conversion, refuse_existing
from minimax_train.engine.hashed import Hashed
from minimax_train.engine.torch_dist import Chunk, Stored, write_chunk, write_index
from minimax_train.plan import Precision
from parallel.layout import Layout

Parts = list[tuple[Entry, Part]]


def from_hf(
    folder: Path,
    final: Path,
    *,
    cast: Precision | None = None,
    layout: Layout | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    quiet: bool = True,
) -> Record:
    """Writes the folder's weights as a checkpoint at `final`, in their own precision or in `cast`; routers are fp32.

    Its tensors lie in chunks of at most 64 MiB that do not cross the borders of a rank's part under `layout`, so that its ranks read their
    own parts only; any other layout reads the checkpoint as well. ValueError on anything that is not exactly a model of this family.
    """
    refuse_existing(final)
    source, layout = open_source(folder), layout or Layout()
    model = source.described.model
    model.check_tensor(layout.tensor)
    model.check_experts(layout.expert, layout.expert_tensor)
    carried.check(folder, source.raw_config)
    precision = precision_of(source.tensors, source.entries, cast)
    record = Record(
        model=model,
        rope_base=source.described.rope_base,
        max_positions=source.described.max_positions,
        precision=precision,
        progress=Progress(),
        optimizer_steps=None,
    )
    identity = {**source.identity(), "precision": precision, "layout": [layout.tensor, layout.expert_tensor], "shard_bytes": shard_bytes}
    parts = [(entry, part) for entry in source.entries for part in entry.parts]
    sizes = [math.prod(part.shape) * dtype_of(entry, precision).itemsize for entry, part in parts]
    try:
        with conversion(final, identity, sum(sizes)) as work:
            (work.result / TENSORS).mkdir(exist_ok=True)
            jobs = []
            for number, run in enumerate(plan_shards(sizes, shard_bytes)):
                shard = _Shard(source, precision, layout, work, f"__{number}_0.distcp")
                held = parts[run.start : run.stop]
                jobs.append(Job(name=shard.name, bytes=sum(sizes[run.start : run.stop]), run=partial(shard.write, held), file=shard.path))
            results = work.do(jobs, "converting", workers=workers, quiet=quiet)
            work.finish(lambda result: _complete(result, source, record, results))
    except FinishedElsewhereError:
        return read_record(final)
    return record


class _Shard:
    """One file of the checkpoint, and the job that writes it."""

    def __init__(self, source: Source, precision: Precision, layout: Layout, work: Work, name: str) -> None:
        self.source, self.precision, self.layout, self.name = source, precision, layout, name
        self.path = work.result / TENSORS / name

    def write(self, parts: Parts) -> dict[str, Any]:
        """Writes the file, on the disk, and tells its checksum and chunks. ValueError listing tensors with NaN or infinity."""
        unfinished = self.path.with_name(f"{self.name}.partial")
        chunks: list[dict[str, Any]] = []
        bad: list[str] = []
        try:
            with Hashed(unfinished) as file, SourceReader(self.source) as reader:
                for entry, part in parts:
                    for piece, numbers in self._pieces(reader, entry, part):
                        if not is_finite(numbers):
                            bad.append(part.name)
                            break
                        self._append(file, entry, piece, numbers, chunks)
            if bad:
                raise ValueError(f"{self.source.folder}: NaN or infinity, as {self.precision}, in {some(bad)}: refused")
            unfinished.rename(self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        return {"bytes": file.size, "xxh3_128": file.digest(), "chunks": chunks}

    def _pieces(self, reader: SourceReader, entry: Entry, part: Part) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece's numbers `[rows, columns]`, cast."""
        dtype = dtype_of(entry, self.precision)
        widest = max(self.source.tensors[part.name].dtype.itemsize, dtype.itemsize)
        for piece in pieces(entry, part, widest, ranks_of(entry, self.layout)):
            yield piece, reader.piece(part, piece).to(dtype)

    def _append(self, file: "Hashed", entry: Entry, piece: Piece, numbers: Tensor, chunks: list[dict[str, Any]]) -> None:
        count = column_parts(entry, ranks_of(entry, self.layout))
        for number, columns in enumerate(numbers.chunk(count, 1)):
            offset, box = list(piece.offset), list(piece.box)
            if count > 1:
                box[-1] //= count
                offset[-1] += number * box[-1]
            start = file.size
            write_chunk(file, (columns.clone() if count > 1 else columns).view(box))
            chunk = Chunk(offset=tuple(offset), shape=tuple(box), file=self.name, start=start, length=file.size - start)
            chunks.append({"key": f"model.{entry.name}", **asdict(chunk)})


def _complete(result: Path, source: Source, record: Record, shards: dict[str, dict[str, Any]]) -> None:
    """What a checkpoint has besides its shards: index, record, the files that travel, manifest."""
    chunks: dict[str, list[Chunk]] = {}
    for shard in shards.values():
        for chunk in shard["chunks"]:
            key, offset, shape = chunk.pop("key"), tuple(chunk.pop("offset")), tuple(chunk.pop("shape"))
            chunks.setdefault(key, []).append(Chunk(offset=offset, shape=shape, **chunk))
    stored = {
        f"model.{entry.name}": Stored(
            shape=entry.shape, dtype=dtype_of(entry, record.precision), chunks=tuple(chunks[f"model.{entry.name}"])
        )
        for entry in source.entries
    }
    write_index(result / TENSORS, stored)
    write_record(result, record)
    carried.carry_in(source.folder, source.raw_config, result)
    known = {f"{TENSORS}/{name}": (shard["bytes"], shard["xxh3_128"]) for name, shard in shards.items()}
    write_manifest(result, known)
