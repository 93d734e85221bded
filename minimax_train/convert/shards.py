"""Which tensors go into which file: runs of the table, in the order of the layers.

The release's own files mix layers (379 of 413 hold tensors of 7), which a writer that goes layer by layer would have to keep in memory.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

SHARD_BYTES = 2_210_000_000
"""Wanted in a file: the release's mean (912,210,767,872 bytes in 413 files)."""


def plan_shards(sizes: Sequence[int], shard_bytes: int = SHARD_BYTES) -> list[range]:
    """Runs of tensors of these sizes, each nearly the same number of bytes: as many as it takes to have `shard_bytes` in each at most,
    but for the one tensor by which a run may be off."""
    ends = list(accumulate(sizes))
    count = min(len(sizes), -(-ends[-1] // shard_bytes))
    borders = [0]
    for shard in range(1, count):
        wanted = ends[-1] * shard // count
        last = bisect_left(ends, wanted)
        if last and wanted - ends[last - 1] < ends[last] - wanted:
            last -= 1
        borders.append(min(max(last + 1, borders[-1] + 1), len(sizes) - (count - shard)))
    return [range(*pair) for pair in zip(borders, [*borders[1:], len(sizes)], strict=True)]


def shard_name(shard: int, count: int, stem: str = "model", suffix: str = ".safetensors") -> str:
    """Hugging Face's name of file `shard` (from 0) of `count`."""
    return f"{stem}{suffix}" if count == 1 else f"{stem}-{shard + 1:05}-of-{count:05}{suffix}"
