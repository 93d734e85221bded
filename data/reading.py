"""A slice's documents, in order and in bounded memory: batches of short ones, long ones in pieces, bad ones by their place."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from data.json_line import parse_line
from data.long_line import BadText, read_string, skeleton, span_of
from data.place import Place
from data.slices import Part, Slice

BATCH = 4 << 20
"""Bytes read, and given on, at once."""

LONG = 32 << 20
"""Bytes of a line or a file that is not held in memory as a whole."""

BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Texts and where each stands."""

    texts: list[str]
    places: Sequence[Place]


@dataclass(frozen=True, kw_only=True)
class LongText:
    """One text in pieces; taking them may raise BadText."""

    pieces: Iterator[str]
    place: Place


@dataclass(frozen=True, kw_only=True)
class Bad:
    """No document, and why."""

    place: Place
    why: str


Record = Batch | LongText | Bad


class LinePlaces(Sequence[Place]):
    """Places of lines, made when they are asked for: few are."""

    def __init__(self, part: Part, numbers: Sequence[int]) -> None:
        self.part, self.numbers = part, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):  # type: ignore[no-untyped-def] # a slice of places is never asked for
        return line_place(self.part, self.numbers[index])


def read(piece: Slice, key: str) -> Iterator[Record]:
    """Every document of a slice, in order."""
    texts: list[str] = []
    places: list[Place] = []
    size = 0
    for part in piece.parts:
        if part.source.kind == "text" and part.stop <= LONG:  # small files share a batch
            record = _file(part)
            if isinstance(record, Bad):
                if texts:
                    yield Batch(texts=texts, places=places)
                    texts, places, size = [], [], 0
                yield record
                continue
            texts.append(record)
            places.append(Place(path=str(part.source.path)))
            size += part.stop
            if size < BATCH:
                continue
        if texts:
            yield Batch(texts=texts, places=places)
            texts, places, size = [], [], 0
        if part.source.kind == "text":
            if part.stop > LONG:
                yield LongText(pieces=_long_file(part), place=Place(path=str(part.source.path)))
        elif part.source.kind == "lines":
            yield from _lines(part, key)
        else:
            from data.tables import read_rows

            yield from read_rows(part, key)
    if texts:
        yield Batch(texts=texts, places=places)


def line_place(part: Part, number: int) -> Place:
    """Line `number` (from 1) of a part."""
    if part.lines is None:
        return Place(path=str(part.source.path), offset=part.start, number=number, unit="line")
    return Place(path=str(part.source.path), number=part.lines + number, unit="line")


def _bytes_of(part: Part) -> Path:
    assert part.file is not None, "a slice that was not wanted is not read"
    return part.file


def _file(part: Part) -> str | Bad:
    content = _bytes_of(part).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        place = Place(path=str(part.source.path), number=content.count(b"\n", 0, error.start) + 1, unit="line")
        return Bad(place=place, why="not UTF-8; convert the file to UTF-8, or leave it out")


def _long_file(part: Part) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 0
    with _bytes_of(part).open("rb") as file:
        while True:
            block = file.read(BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = lines + 1 + error.object.count(b"\n", 0, error.start)
                raise BadText(f"not UTF-8 at line {line}; convert the file to UTF-8, or leave it out") from None
            if not block:
                return
            lines += text.count("\n")
            yield text


def _lines(part: Part, key: str) -> Iterator[Record]:
    """The lines that begin in a part: read in blocks, the last one to its end."""
    number = 0
    with _bytes_of(part).open("rb") as file:
        position = part.start
        if position and not _go_to_line(file, position, part.stop):
            return
        position = file.tell()
        part = replace(part, start=position)
        rest = b""
        while position < part.stop or rest:
            block = file.read(min(BATCH, part.stop - position)) if position < part.stop else file.read(BLOCK)
            if not block and not rest:
                return  # the file was cut short meanwhile
            position += len(block)
            rest += block
            end = len(rest) if not block else rest.rfind(b"\n") + 1 if position <= part.stop else rest.find(b"\n") + 1
            if end:
                lines = rest[:end].split(b"\n")[: -1 if rest[end - 1 : end] == b"\n" else None]
                yield from _batch(part, lines, number, key)
                number += len(lines)
                rest = rest[end:] if position <= part.stop else b""
            elif len(rest) > LONG:
                number += 1
                begin = position - len(rest)
                stop = _end_of_line(file, position)
                yield from _long_line(part, begin, stop, number, key)
                file.seek(stop + 1)
                position, rest = stop + 1, b""


def _go_to_line(file, start: int, stop: int) -> bool:  # type: ignore[no-untyped-def]
    """Puts the file at the first line that begins in start ... stop; False where none does."""
    position = start - 1
    file.seek(position)
    while position < stop - 1:
        block = file.read(min(BLOCK, stop - 1 - position))
        at = block.find(b"\n")
        if at >= 0:
            file.seek(position + at + 1)
            return True
        if not block:
            return False
        position += len(block)
    return False


def _end_of_line(file, position: int) -> int:  # type: ignore[no-untyped-def]
    """Where the line that goes on at `position` ends (the line feed's place, or the file's end)."""
    file.seek(position)
    while block := file.read(BLOCK):
        at = block.find(b"\n")
        if at >= 0:
            return int(position + at)
        position += len(block)
    return position


def _batch(part: Part, lines: list[bytes], before: int, key: str) -> Iterator[Record]:
    """Lines parsed at once, which is fast; where that fails, one by one."""
    numbers: Sequence[int] = range(before + 1, before + 1 + len(lines))
    if any(not line or line.isspace() for line in lines):
        numbers = [number for number, line in zip(numbers, lines, strict=True) if line and not line.isspace()]
        lines = [line for line in lines if line and not line.isspace()]
    try:
        texts = [orjson.loads(line)[key] for line in lines]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        texts = [None]
    if all(type(text) is str for text in texts):
        if texts:
            yield Batch(texts=texts, places=LinePlaces(part, numbers))
        return
    for number, line in zip(numbers, lines, strict=True):
        try:
            yield Batch(texts=[parse_line(line, key)], places=LinePlaces(part, [number]))
        except BadText as error:
            yield Bad(place=line_place(part, number), why=str(error))


def _long_line(part: Part, start: int, stop: int, number: int, key: str) -> Iterator[Record]:
    path, place = _bytes_of(part), line_place(part, number)
    try:
        short, spans = skeleton(path, start, stop)
        text = parse_line(short, key)
    except BadText as error:
        yield Bad(place=place, why=str(error))
        return
    span = span_of(text, spans)
    yield LongText(pieces=read_string(path, span), place=place) if span else Batch(texts=[text], places=[place])
