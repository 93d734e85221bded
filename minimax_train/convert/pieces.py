"""How a tensor is cut so that little of it is in memory at once, and so that ranks of a layout find their own parts whole."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from minimax_train.convert.table import Entry, Part
from parallel.layout import Layout

MOST_BYTES = 1 << 26
"""Of a piece, 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows first .. end - 1 of a tensor of theirs, taken as a matrix (a vector is a column; stacked matrices lie below one another)."""

    first: int
    end: int
    offset: tuple[int, ...]
    """Where the piece lies in our parameter."""
    box: tuple[int, ...]
    """Its shape there."""


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor taken as a matrix."""
    return (shape[0], 1) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])


def pieces(entry: Entry, part: Part, itemsize: int, ranks: int = 1) -> Iterator[Piece]:
    """The pieces of `part`, in the order of its bytes: none larger than MOST_BYTES (or a row), none across the border of two of `ranks`
    tensor-parallel ranks' rows or of two stacked matrices. Columns are whole: see column_parts."""
    rows, columns = (part.box[-2], part.box[-1]) if len(part.box) > 1 else (part.box[0], 1)
    axis = max(len(part.box) - 2, 0)
    height = rows if entry.cut != axis else entry.shape[axis] // entry.matrices // ranks
    most = max(1, MOST_BYTES // (columns * itemsize))
    first = 0
    for stacked in range(math.prod(part.box[:-2])):
        for slice_ in range(0, rows, height):
            for low in range(slice_, slice_ + height, most):
                high = min(low + most, slice_ + height)
                offset = list(part.offset)
                if len(offset) == 3:
                    offset[0] += stacked
                offset[axis] += low
                box = [1] * (len(part.box) - 2) + [high - low, columns] if len(part.box) > 1 else [high - low]
                yield Piece(first=first, end=first + high - low, offset=tuple(offset), box=tuple(box))
                first += high - low


def column_parts(entry: Entry, ranks: int) -> int:
    """Into how many parts the columns of every piece are cut for `ranks` tensor-parallel ranks."""
    return ranks if len(entry.shape) > 1 and entry.cut == len(entry.shape) - 1 else 1


def ranks_of(entry: Entry, layout: Layout) -> int:
    """The ranks that share the entry's cut axis: of the experts, those of an expert."""
    return layout.expert_tensor if len(entry.shape) == 3 else layout.tensor
