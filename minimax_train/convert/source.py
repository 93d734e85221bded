"""A Hugging Face folder as something to read: nothing outside it is opened, nothing in it is executed, every tensor is accounted for."""

import json
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimax_train.convert.config import Described, read_config
from minimax_train.convert.pieces import Piece, matrix
from minimax_train.convert.safetensors_file import NAMES, Located, read_header
from minimax_train.convert.table import Entry, Part, Stacking, is_decay_buffer, table, tensor_count
from minimax_train.engine.torch_dist import Numbers

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_TENSORS = 1_000_000
"""More than that are not listed one by one without a look at how many there are."""
LARGEST_TEXT = 1 << 28
"""Bytes of a JSON or tokenizer file that is read or carried over."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A sound folder: what it describes, and where each of the described tensors lies."""

    folder: Path
    described: Described
    raw_config: dict[str, Any]
    entries: list[Entry]
    tensors: dict[str, Located]

    def identity(self) -> dict[str, Any]:
        """What a resumed conversion compares: sizes and times of its files."""
        files = sorted({place.path for place in self.tensors.values()} | {self.folder / "config.json"})
        return {"source": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]}


class SourceReader(Numbers):
    """Pieces of a source's tensors."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def piece(self, part: Part, piece: Piece) -> Tensor:
        """`[rows, columns]` of a piece in the file's dtype."""
        place, (_, columns) = self.source.tensors[part.name], matrix(part.shape)
        numbers = self.scratch((piece.end - piece.first) * columns, place.dtype)
        return self.fill(numbers, place.path, place.start + piece.first * columns * place.dtype.itemsize).view(-1, columns)


def open_source(folder: Path) -> Source:
    """ValueError, naming file, key or tensor, on anything missing, extra, twice there, misshapen, or outside the folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give a Hugging Face model folder")
    raw = read_json(folder, "config.json", "give a Hugging Face model folder")
    described = read_config(raw, str(folder / "config.json"))
    tensors = _locate(folder)
    names = {name for name in tensors if not is_decay_buffer(name)}
    stacking: Stacking = "memory" if any(name.endswith(".mlp.experts.gate_up_proj") for name in names) else "disk"
    if stacking == "disk" and tensor_count(described.model) > max(len(names), MOST_TENSORS):
        raise ValueError(f"{folder}: its configuration asks for {tensor_count(described.model):,} tensors, the files have {len(names):,}")
    entries = table(described.model, stacking)
    _account(folder, tensors, names, entries)
    return Source(
        folder=folder,
        described=described,
        raw_config=raw,
        entries=entries,
        tensors={name: tensors[name] for name in tensors if name in names},
    )


def inside(folder: Path, name: str) -> Path:
    """folder/name; ValueError where the name leads out of the folder, by itself or by a link, or is no plain file's."""
    path = folder / name
    if not name or name != Path(name).name or "\0" in name:
        raise ValueError(f"{folder}: {name[:200]!r} lies outside the folder: refused")
    try:
        if path.resolve(strict=True).parent != folder.resolve():
            raise ValueError(f"{path} is a link out of the folder: refused; copy the model to a folder of plain files")
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is no plain file")
    except (OSError, RuntimeError) as error:  # not there, or a link to itself
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return path


def read_json(folder: Path, name: str, hint: str) -> dict[str, Any]:
    """The object in a JSON file of the folder."""
    if not (folder / name).exists() and not (folder / name).is_symlink():
        raise ValueError(f"{folder} has no {name}: {hint}")
    path = inside(folder, name)
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a description of a model has at most {LARGEST_TEXT:,}")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error)[:200] or 'nested too deeply'}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, not an object")
    return raw


def _locate(folder: Path) -> dict[str, Located]:
    """Every tensor of every file that the index lists, or of the one file there is."""
    listed: dict[str, Any] | None = None
    if (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        index = read_json(folder, INDEX, "")
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files")
        files = sorted(set(listed.values()))
    elif (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
        files = [WEIGHTS]
    else:
        pickled = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))[:3])
        raise ValueError(
            f"{folder} has neither {INDEX} nor {WEIGHTS}"
            + (f" (pickled files such as {pickled} can run code when read, and never are: ask for safetensors)" if pickled else "")
        )
    places = [inside(folder, name) for name in files]  # all of them before one is opened
    tensors: dict[str, Located] = {}
    for path in places:
        header = read_header(path)
        twice = sorted(header.keys() & tensors.keys())
        if twice:
            raise ValueError(f"{path}: {twice[0]} is in {tensors[twice[0]].path.name} too")
        tensors |= header
    if listed is not None:
        odd = sorted(name for name in listed.keys() | tensors.keys() if name not in tensors or listed.get(name) != tensors[name].path.name)
        if odd:
            raise ValueError(f"{folder / INDEX} and the files disagree about {some(odd)}")
        _check_total(folder / INDEX, index, tensors)
    stray = sorted(p.name for p in folder.glob("model*.safetensors") if p.name not in files)
    if stray:
        raise ValueError(
            f"{folder} has weights that {INDEX if listed else WEIGHTS + ' beside them'} does not list: {some(stray)}; remove them"
        )
    return tensors


def _check_total(path: Path, index: dict[str, Any], tensors: dict[str, Located]) -> None:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(place.size for place in tensors.values())
    if total is not None and total != found:
        raise ValueError(f"{path} says total_size {total}; the tensors in its files have {found} bytes")


def _account(folder: Path, tensors: dict[str, Located], names: set[str], entries: list[Entry]) -> None:
    """Every tensor is wanted, every wanted one is there, with its shape."""
    wanted = {part.name: part.shape for entry in entries for part in entry.parts}
    for problem, odd in (("lacks", wanted.keys() - names), ("has unknown", names - wanted.keys())):
        if odd:
            raise ValueError(f"{folder} {problem} {some(sorted(odd))}")
    wrong = [f"{name} has {list(tensors[name].shape)}, not {list(shape)}" for name, shape in wanted.items() if tensors[name].shape != shape]
    if wrong:
        raise ValueError(f"{folder} has shapes that its configuration does not ask for, {some(wrong)}")


def some(names: Iterable[str], most: int = 5) -> str:
    """`3 tensors: a, b, c`: how many, and the first few."""
    names = list(names)
    return f"{len(names)}: {', '.join(name[:200] for name in names[:most])}{', ...' if len(names) > most else ''}"


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """As safetensors writes them."""
    return ", ".join(sorted(NAMES[dtype] for dtype in dtypes))
