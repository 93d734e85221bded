"""One safetensors file: its header read strictly, or written before its tensors are there.

Format: 8 bytes little-endian N; N bytes of JSON, name -> {dtype, shape, data_offsets}, perhaps `__metadata__`; then the tensors' bytes,
without a gap. The library's own reader is not used because it maps the file, whose pages then count as this process's memory, takes
the last of two equal names, and offers no reading in pieces; its writer wants every tensor in memory.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class Located:
    """A tensor in a file: its numbers are the bytes start .. start + size - 1."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Located]:
    """Every tensor of the file, in the order of its bytes. ValueError, naming the file and what is wrong, on an unsound header."""
    with path.open("rb") as file:
        there = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if there < 8 or length > min(there - 8, LONGEST_HEADER):
            raise ValueError(f"{path} is no safetensors file: its header would be {length:,} bytes long, the file has {there:,}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is refused: {str(error)[:200] or 'nested too deeply'}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    begin = 8 + length
    tensors = sorted(((name, *_entry(path, name, entry)) for name, entry in header.items()), key=lambda t: (t[3], t[4]))
    at = 0
    for name, dtype, shape, first, end in tensors:
        if first != at or end - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{path}: {name[:100]} lies at bytes {first:,} to {end:,}; a gap, an overlap, or not {math.prod(shape) * dtype.itemsize:,} "
                f"bytes of its shape {list(shape)} (expected from {at:,})"
            )
        at = end
    if begin + at != there:
        raise ValueError(f"{path} has {there:,} bytes; its header describes {begin + at:,}")
    return {name: Located(path=path, dtype=dtype, shape=shape, start=begin + first) for name, dtype, shape, first, _ in tensors}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} is there twice")
    return made


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    try:
        dtype, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, end]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: {name[:100]} has no dtype, shape and data_offsets") from None
    if len(entry) != 3 or not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {name[:100]} has dtype {str(dtype)[:100]}; known are {', '.join(DTYPES)}")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or len(shape) > 8:
        raise ValueError(
            f"{path}: {name[:100]} has shape {str(shape)[:100]} and data_offsets {str([first, end])[:100]}: natural numbers are needed"
        )
    return DTYPES[dtype], tuple(shape), first, end


def header_of(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file that holds these tensors in this order; a multiple of 8, as the library writes it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
