"""Slices: fixed parts of a corpus, decided by the input alone. One slice becomes one shard, whoever encodes it and when."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.corpus import Source

SLICE = 16 << 20
"""Bytes of input in a slice (of unpacked text where the input is compressed), to the next line, row group or end of a file."""

FILES = 4096
"""Most files in a slice."""

BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of one source is in a slice.

    `start` and `stop` are bytes (lines that begin there; all of a text), row groups (Parquet) or rows (a dataset). `file` holds the bytes:
    the source itself, or what was unpacked from it; None where nobody needs them. `lines` are the lines before `start`, if known.
    """

    source: Source
    file: Path | None
    start: int
    stop: int
    lines: int | None = None
    size: int
    """Bytes of the source's file that this part stands for, for progress."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Parts of one input argument, in order. `unpacked` are files to remove when the shard is there."""

    number: int
    parts: tuple[Part, ...]
    unpacked: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(part.size for part in self.parts)


@dataclass(kw_only=True)
class _Open:
    """The slice that is being filled."""

    number: int = 0
    size: int = 0
    parts: list[Part] = field(default_factory=list)


def cut(sources: Sequence[Source], *, key: str, room: Path, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Slice]:
    """The slices of `sources` in order, numbered from 0; they depend on nothing but the files and SLICE.

    A compressed file is unpacked into the folder `room` slice by slice, just ahead of the caller; for a slice that is not `wanted` it is
    read but not written. Raises ValueError for a damaged file.
    """
    filling = _Open()
    given = None
    for source in sources:
        if filling.parts and source.given != given:
            yield _close(filling)
        given = source.given
        for part, bulk in _parts(source, key, lambda: room / f"{filling.number:08}-{len(filling.parts)}", lambda: wanted(filling.number)):
            filling.parts.append(part)
            filling.size += bulk
            if filling.size >= SLICE or len(filling.parts) >= FILES:
                yield _close(filling)
    if filling.parts:
        yield _close(filling)


def _close(filling: _Open) -> Slice:
    unpacked = tuple(part.file for part in filling.parts if part.source.codec and part.file)
    closed = Slice(number=filling.number, parts=tuple(filling.parts), unpacked=unpacked)
    filling.number, filling.size, filling.parts = filling.number + 1, 0, []
    return closed


def _parts(source: Source, key: str, target: Callable[[], Path], wanted: Callable[[], bool]) -> Iterator[tuple[Part, int]]:
    """Parts of one source, none much larger than a slice if it can be cut, each with its bulk in bytes."""
    if source.codec:
        yield from _unpack(source, target, wanted)
        return
    whole = Part(source=source, file=source.path, start=0, stop=source.size, lines=0, size=source.size)
    if source.kind == "lines":
        for start in range(0, source.size, SLICE):
            stop = min(start + SLICE, source.size)
            yield replace(whole, start=start, stop=stop, lines=0 if start == 0 else None, size=stop - start), stop - start
    elif source.kind == "text":
        yield whole, source.size
    else:
        from data.tables import bulks

        ranges = list(bulks(source, key, SLICE))
        total = max(1, sum(bulk for _, _, bulk in ranges))
        for start, stop, bulk in ranges:
            yield replace(whole, start=start, stop=stop, size=source.size * bulk // total), bulk


def _unpack(source: Source, target: Callable[[], Path], wanted: Callable[[], bool]) -> Iterator[tuple[Part, int]]:
    """A compressed file in parts of whole lines (a text: in one part), written to `target()`."""
    blocks = _blocks(source)
    block, position, told, lines, more = b"", 0, 0, 0, True
    while more:
        path = target() if wanted() else None
        size, begun = 0, lines
        with path.open("wb") if path else nullcontext() as output:
            while True:
                if not block:
                    block, position = next(blocks, (b"", source.size))
                if not block:
                    more = False
                    break
                full = source.kind == "lines" and size + len(block) >= SLICE
                end = block.find(b"\n", max(0, SLICE - size - 1)) + 1 if full else 0
                piece, block = (block[:end], block[end:]) if end else (block, b"")
                size, lines = size + len(piece), lines + piece.count(b"\n")
                if output:
                    output.write(piece)
                if end:
                    break
        yield Part(source=source, file=path, start=0, stop=size, lines=begun, size=position - told), size
        told = position


def _blocks(source: Source) -> Iterator[tuple[bytes, int]]:
    """Unpacked bytes, and how far the packed file was read for them."""
    import pyarrow

    with pyarrow.OSFile(str(source.path)) as packed:
        try:
            with pyarrow.CompressedInputStream(packed, source.codec) as stream:
                while block := stream.read(BLOCK):
                    yield block, min(packed.tell(), source.size)
        except OSError as error:
            raise ValueError(f"{source.path}: damaged {source.codec} file ({error}); unpack it from a good copy") from None
