"""megatron-core's `torch_dist` folders a chunk at a time, without a model and without other ranks.

Format (torch.distributed.checkpoint, as megatron-core 0.16 writes and reads it): `.metadata`, a pickle that says of every tensor its
shape, dtype and chunks, boxes that fill it, and of every chunk a file, a place and a length; there lies what torch.save makes of the
chunk. `metadata.json` and `common.pt` are megatron-core's own. A chunk may be any box, so a folder can be read under any layout.
"""

import io
import json
import math
import mmap
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from torch import Tensor
from torch.utils.serialization import config

METADATA = ".metadata"
OWN_FILES = ("metadata.json", "common.pt")
BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "BytesStorageMetadata",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}  # fmt: skip
_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_VALUES = {
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
}


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


class _Record:
    """What a pickle says of one of torch's records: its fields as attributes, or, where it has another form, as `state`."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Records(pickle.Unpickler):
    """Makes `_Record`s and numbers, nothing else, and calls nothing of torch's: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return type(name, (_Record,), {})
        if (module, name) in _VALUES:
            return _VALUES[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint's metadata holds")


def read_index(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder. ValueError where `.metadata` is or makes anything but the records of one, or a chunk has no place in a
    file of the folder's own."""
    path = folder / METADATA
    try:
        metadata = _Records(io.BytesIO(path.read_bytes())).load()
        places = {(place.fqn, tuple(place.offset or ())): info for place, info in metadata.storage_data.items()}
        tensors = {key: tensor for key, tensor in metadata.state_dict_metadata.items() if hasattr(tensor, "chunks")}
        return {key: _stored(key, tensor, places) for key, tensor in tensors.items()}
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {METADATA}: it is no torch_dist checkpoint") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is refused: {type(error).__name__}: {error}") from None


def _stored(key: str, tensor: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]) -> Stored:
    chunks, shape, filled = [], tuple(tensor.size), 0
    dtype = tensor.properties.state[0]
    if not isinstance(dtype, torch.dtype) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{key} has dtype {dtype} and shape {shape}")
    for chunk in tensor.chunks:
        info = places[key, tuple(chunk.offsets)]
        box = list(zip(chunk.offsets, chunk.sizes, shape, strict=True))
        if not all(type(n) is int and n >= 0 for n in (info.offset, info.length, *chunk.offsets, *chunk.sizes)):
            raise ValueError(f"{key} has a chunk at {chunk.offsets} of {chunk.sizes}, in bytes {info.length} from {info.offset}")
        if any(low + size > whole for low, size, whole in box):
            raise ValueError(f"{key} has a chunk at {chunk.offsets} of {chunk.sizes}, beyond its shape {shape}")
        filled += math.prod(chunk.sizes)
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{key} lies in {info.relative_path!r}, outside the folder")
        place = {"file": str(info.relative_path), "start": int(info.offset), "length": int(info.length)}
        chunks.append(Chunk(offset=tuple(chunk.offsets), shape=tuple(chunk.sizes), **place))  # type: ignore[arg-type]
    if filled != math.prod(shape) or _overlapping(chunks):
        raise ValueError(f"{key} has chunks that do not fill its shape {shape} once")
    return Stored(shape=shape, dtype=dtype, chunks=tuple(chunks))


def _overlapping(chunks: list[Chunk]) -> bool:
    """Whether two boxes share a number: sorted by their first axis, only neighbours in it are held against each other."""
    ordered, begun = sorted(chunks, key=lambda chunk: chunk.offset), list[Chunk]()
    for chunk in ordered:
        begun = [other for other in begun if other.offset[0] + other.shape[0] > chunk.offset[0]]
        for other in begun:
            sides = zip(chunk.offset, chunk.shape, other.offset, other.shape, strict=True)
            if all(a < b + n and b < a + m for a, m, b, n in sides):
                return True
        begun.append(chunk)
    return False


class Numbers:
    """Numbers out of files, into memory that is used again: first touches of fresh memory cost as much as the reading. What a method
    returns is good until the next one is called. A context manager that holds each file open."""

    def __init__(self) -> None:
        self._files: dict[Path, IO[bytes]] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        """`[count]` uninitialised numbers, all of their storage."""
        if len(self._scratch) != count * dtype.itemsize:
            self._scratch = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        return self._scratch.view(dtype)

    def open(self, path: Path) -> IO[bytes]:
        """The file, opened once."""
        if path not in self._files:
            self._files[path] = path.open("rb", buffering=0)
        return self._files[path]

    def fill(self, out: Tensor, path: Path, start: int) -> Tensor:
        """Fills `out`, contiguous, from byte `start` of the file. OSError where the file ends before."""
        file, view, done = self.open(path), memoryview(out.view(torch.uint8).view(-1).numpy().data), 0
        file.seek(start)
        while done < len(view):
            got = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise OSError(f"{path} ends {len(view) - done} bytes early")
            done += got
        return out


class Reader(Numbers):
    """Rows of stored tensors, and no more of them in memory than is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._data: dict[tuple[str, int], int] = {}  # (file, start of a chunk) -> where its numbers start

    def rows(self, key: str, stored: Stored, leading: tuple[int, ...], first: int, end: int) -> Tensor:
        """`[end - first, columns]`: of the matrix that `leading` picks of a stored tensor (of its rows and columns; a vector is a column)
        the rows first .. end - 1. ValueError where no chunk holds a part of them."""
        columns = _as_matrices(stored.shape)[-1]
        out = self.scratch((end - first) * columns, stored.dtype).view(-1, columns)
        filled = 0
        for chunk in stored.chunks:
            offset, size = _as_matrices(chunk.offset, pad=0), _as_matrices(chunk.shape)
            place = [i - low for i, low in zip(leading, offset[:-2], strict=True)]
            low, high = max(first, offset[-2]), min(end, offset[-2] + size[-2])
            if low >= high or any(not 0 <= i < n for i, n in zip(place, size[:-2], strict=True)):
                continue
            matrix = 0
            for i, n in zip(place, size[:-2], strict=True):
                matrix = matrix * n + i
            box = out[low - first : high - first, offset[-1] : offset[-1] + size[-1]]
            start = self._start(key, chunk, stored.dtype) + (matrix * size[-2] + low - offset[-2]) * size[-1] * stored.dtype.itemsize
            if box.is_contiguous():
                self.fill(box, self.folder / chunk.file, start)
            else:
                box.copy_(self.fill(torch.empty(box.shape, dtype=stored.dtype), self.folder / chunk.file, start))
            filled += box.numel()
        if filled != out.numel():
            raise ValueError(f"{self.folder} holds only {filled} of the {out.numel()} numbers of {key}, rows {first} to {end - 1}")
        return out

    def _start(self, key: str, chunk: Chunk, dtype: torch.dtype) -> int:
        place = chunk.file, chunk.start
        if place not in self._data:
            self._data[place] = chunk.start + _numbers_at(self.open(self.folder / chunk.file), key, chunk, dtype)
        return self._data[place]


def _numbers_at(file: IO[bytes], key: str, chunk: Chunk, dtype: torch.dtype) -> int:
    """Where in a chunk's torch.save its numbers start; ValueError where it is not the plain tensor that the metadata says."""
    page = chunk.start % mmap.ALLOCATIONGRANULARITY
    try:
        with mmap.mmap(file.fileno(), page + chunk.length, offset=chunk.start - page, access=mmap.ACCESS_READ) as blob:
            blob.seek(page)
            tensor = torch.load(cast(IO[bytes], blob), map_location="meta", weights_only=True)
        plain = isinstance(tensor, Tensor) and tensor.is_contiguous() and tensor.storage_offset() == 0
        found = (tuple(tensor.shape), tensor.dtype) if plain else None
        at = tensor.untyped_storage()._checkpoint_offset if plain else None  # documented: where a saved tensor's bytes are
    except Exception as error:  # torch.load raises what it likes
        raise ValueError(f"{file.name}: {key} at {list(chunk.offset)} cannot be read: {error}") from None
    if found != (chunk.shape, dtype) or not isinstance(at, int):
        raise ValueError(f"{file.name}: {key} at {list(chunk.offset)} is {found or 'no plain tensor'}, not {(chunk.shape, dtype)}")
    return at


def _as_matrices(shape: tuple[int, ...], pad: int = 1) -> tuple[int, ...]:
    """A shape (or, with pad 0, an offset) with rows and columns: those of a vector are its numbers and one column."""
    return (*shape, pad) if len(shape) == 1 else shape


def write_chunk(file: Any, tensor: Tensor) -> None:
    """Writes `tensor`, contiguous and all of its storage, where `file` (anything with `write`) stands."""
    assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # put there at import  # the manifest has a better one
        try:
            torch.save(tensor, file)
        except RuntimeError as error:  # "unexpected pos": what its writer makes of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write_index(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Writes `.metadata`, `metadata.json` and `common.pt`, the same bytes for the same tensors."""
    from torch.distributed.checkpoint import filesystem  # here, for it takes longer than torch itself, and only this needs it
    from torch.distributed.checkpoint import metadata as torch_metadata

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
