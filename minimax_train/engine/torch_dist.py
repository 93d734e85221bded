"""megatron-core's `torch_dist` folders a chunk at a time, without a model and without other ranks.

Format (torch.distributed.checkpoint, as megatron-core 0.16 writes and reads it): `.metadata`, a pickle that says of every tensor its
shape, dtype and chunks, boxes that fill it, and of every chunk a file, a place and a length; there lies what torch.save makes of the
chunk. `metadata.json` and `common.pt` are megatron-core's own. A chunk may be any box, so a folder can be read under any layout.
"""

import io
import json
import mmap
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.utils.serialization import config

METADATA = ".metadata"
OWN_FILES = ("metadata.json", "common.pt")
BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}

_KNOWN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "BytesStorageMetadata",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    *(("torch.distributed.checkpoint.planner", name) for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")),
    ("collections", "OrderedDict"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a tensor and where its torch.save lies: `length` bytes of `file` from `start`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a folder."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class _KnownClasses(pickle.Unpickler):
    """Makes nothing but the records of a `.metadata`: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint's metadata holds")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> torch_metadata.Metadata:
    """The records of `.metadata`; nothing else is made or run. ValueError where it is something else."""
    path = folder / METADATA
    try:
        metadata = _KnownClasses(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {METADATA}: it is no torch_dist checkpoint") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is refused: {type(error).__name__}: {error}") from None
    if not isinstance(metadata, torch_metadata.Metadata):
        raise ValueError(f"{path} holds {type(metadata).__name__}, not a checkpoint's metadata")
    return metadata


def read_index(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder. ValueError where a chunk has no place, or its place is no file of the folder's own."""
    metadata = read_metadata(folder)
    places = {(place.fqn, tuple(place.offset or ())): info for place, info in metadata.storage_data.items()}
    stored = {}
    for key, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, torch_metadata.TensorStorageMetadata):
            continue
        chunks = []
        for chunk in tensor.chunks:
            info = places.get((key, tuple(chunk.offsets)))
            if info is None or Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"{folder / METADATA} gives no place in this folder for {key} at {list(chunk.offsets)}")
            chunks.append(
                Chunk(offset=tuple(chunk.offsets), shape=tuple(chunk.sizes), file=info.relative_path, start=info.offset, length=info.length)
            )
        stored[key] = Stored(shape=tuple(tensor.size), dtype=tensor.properties.dtype, chunks=tuple(chunks))
    return stored


class Reader:
    """Rows of stored tensors; holds each file open, and no more of them in memory than is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._data: dict[tuple[str, int], int] = {}  # (file, start of a chunk) -> where its numbers start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def rows(self, key: str, stored: Stored, leading: tuple[int, ...], first: int, end: int) -> Tensor:
        """`[end - first, columns]`: of the matrix that `leading` picks of a stored tensor (of its rows and columns; a vector is a column)
        the rows first .. end - 1. ValueError where no chunk holds a part of them."""
        shape = _as_matrices(stored.shape)
        out = torch.empty((end - first, shape[-1]), dtype=stored.dtype)
        filled = 0
        for chunk in stored.chunks:
            offset, size = _as_matrices(chunk.offset, pad=0), _as_matrices(chunk.shape)
            place = [i - low for i, low in zip(leading, offset[:-2], strict=True)]
            if any(not 0 <= i < n for i, n in zip(place, size[:-2], strict=True)):
                continue
            low, high = max(first, offset[-2]), min(end, offset[-2] + size[-2])
            if low >= high:
                continue
            matrix = 0
            for i, n in zip(place, size[:-2], strict=True):
                matrix = matrix * n + i
            part = self._read(key, chunk, stored.dtype, (matrix * size[-2] + low - offset[-2]) * size[-1], (high - low) * size[-1])
            out[low - first : high - first, offset[-1] : offset[-1] + size[-1]] = part.view(high - low, size[-1])
            filled += part.numel()
        if filled != out.numel():
            raise ValueError(f"{self.folder} holds only {filled} of the {out.numel()} numbers of {key}, rows {first} to {end - 1}")
        return out

    def _read(self, key: str, chunk: Chunk, dtype: torch.dtype, first: int, count: int) -> Tensor:
        file = self._files.get(chunk.file)
        if file is None:
            file = self._files[chunk.file] = (self.folder / chunk.file).open("rb", buffering=0)
        start = self._data.get((chunk.file, chunk.start))
        if start is None:
            start = self._data[chunk.file, chunk.start] = chunk.start + _numbers_at(file, key, chunk, dtype)
        return read_numbers(file, start + first * dtype.itemsize, count, dtype)


def read_numbers(file: IO[bytes], start: int, count: int, dtype: torch.dtype) -> Tensor:
    """`[count]` numbers of an unbuffered file from byte `start`. OSError where the file ends before."""
    out = torch.empty(count, dtype=dtype)
    view = memoryview(out.view(torch.uint8).numpy().data)
    file.seek(start)
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise OSError(f"{file.name} ends {len(view) - done} bytes early")
        done += got
    return out


def _numbers_at(file: IO[bytes], key: str, chunk: Chunk, dtype: torch.dtype) -> int:
    """Where in a chunk's torch.save its numbers start; ValueError where it is not the plain tensor that the metadata says."""
    page = chunk.start % mmap.ALLOCATIONGRANULARITY
    try:
        with mmap.mmap(file.fileno(), page + chunk.length, offset=chunk.start - page, access=mmap.ACCESS_READ) as blob:
            blob.seek(page)
            tensor = torch.load(cast(IO[bytes], blob), map_location="meta", weights_only=True)
        plain = isinstance(tensor, Tensor) and tensor.is_contiguous() and tensor.storage_offset() == 0
        found = (tuple(tensor.shape), tensor.dtype) if plain else None
    except Exception as error:  # torch.load raises what it likes
        raise ValueError(f"{file.name}: {key} at {list(chunk.offset)} cannot be read: {error}") from None
    if found != (chunk.shape, dtype):
        raise ValueError(f"{file.name}: {key} at {list(chunk.offset)} is {found or 'no plain tensor'}, not {(chunk.shape, dtype)}")
    at: int = tensor.untyped_storage()._checkpoint_offset  # documented: where a saved tensor's bytes are
    return at


def _as_matrices(shape: tuple[int, ...], pad: int = 1) -> tuple[int, ...]:
    """A shape (or, with pad 0, an offset) with rows and columns: those of a vector are its numbers and one column."""
    return (*shape, pad) if len(shape) == 1 else shape


def write_chunk(file: Any, tensor: Tensor) -> None:
    """Writes `tensor`, contiguous and all of its storage, where `file` (anything with `write`) stands."""
    assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # put there at import  # the manifest has a better one
        torch.save(tensor, file)


def write_index(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Writes `.metadata`, `metadata.json` and `common.pt`, the same bytes for the same tensors."""
    tensors: dict[str, Any] = {}
    places: dict[torch_metadata.MetadataIndex, Any] = {}
    for key, tensor in stored.items():
        boxes = [torch_metadata.ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in tensor.chunks]
        properties = torch_metadata.TensorProperties(dtype=tensor.dtype)
        tensors[key] = torch_metadata.TensorStorageMetadata(properties, torch.Size(tensor.shape), boxes)
        for chunk in tensor.chunks:
            place = torch_metadata.MetadataIndex(key, torch.Size(chunk.offset))
            places[place] = filesystem._StorageInfo(sys.intern(chunk.file), chunk.start, chunk.length)  # a pickle tells equal from same
    metadata = torch_metadata.Metadata(state_dict_metadata=tensors, storage_data=places)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps(BACKENDS))
    torch.save({}, folder / "common.pt")
