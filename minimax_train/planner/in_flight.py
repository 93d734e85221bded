"""How many rows each pipeline rank holds activations of, by megatron-core's schedules (pipeline_parallel/schedules.py)."""

from collections import Counter
from collections.abc import Iterator

from parallel.layout import Layout


def moments(layout: Layout, rank: int, rows: int) -> Iterator[tuple[int, Counter[int]]]:
    """Each backward pass of one pipeline rank in a batch of `rows` rows of a data-parallel rank: the chunk (of the rank's own) that it runs
    through, and how many rows each chunk holds activations of when it begins, this one included.

    1F1B: a rank runs ahead by as many rows as there are ranks behind it. Interleaved: chunks take turns, `pipeline` rows each. Of a long
    batch the first 4 rounds: later ones repeat them.
    """
    ranks, chunks = layout.pipeline, layout.virtual_pipeline
    rows = min(rows, 4 * ranks)
    turns = rows * chunks
    ahead = ranks - rank - 1 if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks
    ahead = turns if chunks > 1 and rows == ranks else min(ahead, turns)  # with a round alone all is forward first
    held: Counter[int] = Counter()
    for turn in range(ahead):
        held[_chunk(turn, ranks, chunks)] += 1
    for turn in range(turns):
        if ahead + turn < turns:
            held[_chunk(ahead + turn, ranks, chunks)] += 1
        chunk = chunks - 1 - _chunk(turn, ranks, chunks)
        yield chunk, held.copy()
        held[chunk] -= 1


def _chunk(turn: int, ranks: int, chunks: int) -> int:
    return turn // ranks % chunks
