"""Where a document stands, so that a person can find it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """A whole file, or line or row `number` of it, counted from 1 after byte `offset` (of a file that holds lines)."""

    path: str
    offset: int = 0
    number: int = 0
    unit: str = ""
    """"" (the whole file), "line" or "row"."""

    def name(self) -> str:
        """path, path:line or path:row; reads the file up to `offset` to count its lines."""
        return names_of([self])[0]


def names_of(places: Iterable[Place]) -> list[str]:
    """The names of `places`, in their order; each file is read once, up to the last offset asked for."""
    wanted = list(places)
    lines: dict[tuple[str, int], int] = {}
    for path in {place.path for place in wanted}:
        offsets = sorted({place.offset for place in wanted if place.path == path})
        lines |= {(path, offset): count for offset, count in zip(offsets, _lines_before(Path(path), offsets), strict=True)}
    return [place.path + (f":{lines[place.path, place.offset] + place.number}" if place.unit else "") for place in wanted]


def _lines_before(path: Path, offsets: list[int]) -> Iterable[int]:
    """Line feeds before each of the ascending `offsets`."""
    if not any(offsets):
        return [0] * len(offsets)
    counts, lines, position = [], 0, 0
    with path.open("rb") as file:
        for offset in offsets:
            while position < offset:
                block = file.read(min(BLOCK, offset - position))
                if not block:
                    break
                lines, position = lines + block.count(b"\n"), position + len(block)
            counts.append(lines)
    return counts
