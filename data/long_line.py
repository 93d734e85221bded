"""A line of JSON too long to hold: its long strings are found where they stand and read piece by piece."""

import re
from collections.abc import Iterator
from pathlib import Path

import orjson

BLOCK = 1 << 20
SHORT = 1 << 16
"""Longest string, in bytes, that is taken over into the skeleton."""

MOST = 32 << 20
"""Most bytes of a line outside its long strings."""

_MARK = "\x00long "
_NUL = b"\\u0000"
"""How a mark begins in JSON, and any other string whose first character is NUL: there is no second way to write it."""

_ESCAPE = re.compile(rb"\\u[0-9a-fA-F]{4}|\\[^u]")


class BadText(ValueError):
    """What is wrong with a document; its place is told elsewhere."""


def skeleton(path: Path, start: int, stop: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The JSON in bytes start ... stop of a file with each string longer than SHORT replaced by a mark, and where their contents stand.

    The skeleton is valid JSON if the line is, but for what is inside the long strings (`read_string` sees to that). Raises BadText when
    what is left is longer than MOST.
    """
    out, held = bytearray(), bytearray()
    spans: list[tuple[int, int]] = []
    inside = escaped = False
    begin = position = start
    with path.open("rb") as file:
        file.seek(start)
        while position < stop and (block := file.read(min(BLOCK, stop - position))):
            at = 0
            while at < len(block):
                if not inside:
                    quote = block.find(b'"', at)
                    out += block[at : quote + 1 if quote >= 0 else len(block)]
                    at = quote + 1 if quote >= 0 else len(block)
                    inside, begin = quote >= 0, position + at
                    held.clear()
                    continue
                quote, escaped = _closing(block, at, escaped)
                end = quote if quote >= 0 else len(block)
                if len(held) <= SHORT:
                    held += block[at:end]
                if quote >= 0:
                    long = position + end - begin > SHORT or held.startswith(_NUL)  # a short string could be taken for a mark
                    out += _mark(len(spans)) if long else held
                    out += b'"'
                    spans += [(begin, position + end)] if long else []
                    inside = False
                at = end + 1
            position += len(block)
            if len(out) > MOST:
                raise BadText(f"a line with more than {MOST >> 20} MiB besides its long texts; split it")
    return bytes(out), spans


def span_of(text: str, spans: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Where the content of this string of a parsed skeleton stands in the file; None when the string is itself."""
    return spans[int(text.removeprefix(_MARK))] if text.startswith(_MARK) else None


def read_string(path: Path, span: tuple[int, int]) -> Iterator[str]:
    """The text of a JSON string (its content, without quotes, in bytes span[0] ... span[1]) in pieces. Raises BadText where it is none."""
    position, stop = span
    rest = b""
    with path.open("rb") as file:
        file.seek(position)
        while position < stop or rest:
            block = file.read(min(BLOCK, stop - position))
            position += len(block)
            rest += block
            end = len(rest) if position >= stop or not block else _whole(rest)
            try:
                text = orjson.loads(b'"' + rest[:end] + b'"')
            except orjson.JSONDecodeError as error:
                raise BadText(
                    f"not a JSON string of UTF-8 between bytes {position - len(rest)} and {position} of the file ({error})"
                ) from None
            rest = rest[end:]
            yield text
            if not block:
                return


def _mark(number: int) -> bytes:
    return orjson.dumps(f"{_MARK}{number}")[1:-1]


def _closing(block: bytes, at: int, escaped: bool) -> tuple[int, bool]:
    """Where the string that holds block[at] ends in this block (-1: not in it), and whether the next block begins with an escaped byte."""
    first = at + 1 if escaped else at
    quote = block.find(b'"', first)
    while quote >= 0:
        if not _odd_backslashes(block, first, quote):
            return quote, False
        first = quote + 1
        quote = block.find(b'"', first)
    return -1, _odd_backslashes(block, first, len(block))


def _odd_backslashes(block: bytes, first: int, end: int) -> bool:
    """Whether the backslashes just before `end` are odd in number; block[first] is no escaped byte."""
    run = end
    while run > first and block[run - 1] == 0x5C:
        run -= 1
    return (end - run) % 2 == 1


def _whole(content: bytes) -> int:
    """A place to cut the content of a JSON string: not within a UTF-8 character, an escape or a pair of surrogate escapes."""
    end = len(content)
    while end > max(0, len(content) - 4) and content[end - 1] & 0xC0 == 0x80:
        end -= 1
    if end and content[end - 1] >= 0xC0:
        end -= 1  # the character's first byte: leave all of it to the next piece
    elif end < len(content):
        end = len(content)  # not UTF-8: let the parser say so
    for _ in range(2):  # an escape cut in the middle, then the half of a pair that stands before it
        at = content.rfind(b"\\", max(0, end - 6), end)
        if at < 0:
            break
        if not _odd_backslashes(content, 0, at + 1):
            at -= 1
        escape = _ESCAPE.match(content, at, end)
        high = escape is not None and escape.end() == end and content[at + 2 : at + 4].lower() in (b"d8", b"d9", b"da", b"db")
        if escape is not None and not (high and content[at + 1 : at + 2] == b"u"):
            break
        end = at
    return end
