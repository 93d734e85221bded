"""Loss and gradient by where tokens came from: the source of their row, and the length of their document in it.

The gradient's norm over all weights cannot be told apart by source without a backward pass for each. What can is the gradient of the summed
loss with respect to each embedded token: it has come down through every layer. Its root mean square over a source's tokens is kept.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from minimax_train.model.row import Row

LONGEST = tuple(4**power for power in range(3, 11))
"""Longest document of each bucket, in tokens: 64, 256, 1K, ... 1M; one more bucket holds what is longer."""
BUCKETS = len(LONGEST) + 1
FIGURES = 4
"""Sums of each bucket: losses, predicted tokens, squared gradients at embedded tokens, tokens with such a gradient."""


class Tally:
    """One row's sums on one rank: `sums` `[BUCKETS, FIGURES]` fp64. Nothing is read back from the device."""

    def __init__(self, row: Row) -> None:
        device = row.tokens.device
        lengths, buckets = _segments(row)
        self.present = sorted(set(buckets))
        small = torch.tensor([lengths, buckets], pin_memory=device.type == "cuda").to(device, non_blocking=True)
        self._buckets = torch.repeat_interleave(small[1], small[0], output_size=len(row.tokens))
        self.sums = torch.zeros(BUCKETS, FIGURES, dtype=torch.float64, device=device)

    def losses(self, losses: Tensor, labels: Tensor) -> None:
        """Adds the losses `[T]` of this rank's tokens, 0 where the label is negative."""
        self._add(0, losses.detach(), self._buckets)
        self._add(1, (labels >= 0).double(), self._buckets)

    def embedded(self, x: Tensor, rank: int) -> Tensor:
        """x itself, whose gradient will be added when it is known; x is the part of tensor-parallel rank `rank`, `[T / tensor, hidden]`."""
        if x.requires_grad:
            mine = self._buckets[rank * len(x) : (rank + 1) * len(x)]
            x.register_hook(lambda gradient: self._gradient(gradient, mine))
        return x

    def _gradient(self, gradient: Tensor, mine: Tensor) -> None:
        norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)  # no copy of the gradient in fp32
        self._add(2, norms.double().square(), mine)
        self._add(3, torch.ones_like(mine, dtype=torch.float64), mine)

    def _add(self, figure: int, values: Tensor, buckets: Tensor) -> None:
        """Bucket by bucket, so that what is no number in one does not reach another, in the same order every time."""
        for bucket in self.present:
            self.sums[bucket, figure] += torch.where(buckets == bucket, values, 0).sum(dtype=torch.float64)


def _segments(row: Row) -> tuple[list[int], list[int]]:
    """This rank's tokens as stretches of one document each: tokens of the stretch, bucket of the whole document."""
    lengths, buckets = [], []
    for run in row.pieces.runs(row.rank):
        at = run.start
        while at < run.stop:
            begin, end = row.pieces.begin(at), row.pieces.end(at)
            lengths.append(min(end, run.stop) - at)
            buckets.append(bisect_left(LONGEST, end - begin))
            at = min(end, run.stop)
    return lengths, buckets


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part of a batch said."""

    loss: float | None
    """Nats per predicted token; None where none is predicted."""
    gradient: float | None
    """Root mean square over its tokens of the norm of the gradient of the batch's summed loss at their embeddings; None without one."""


def by_source(sums: Tensor) -> list[Part]:
    """`[sources, BUCKETS, FIGURES]` on the host -> a part for each source."""
    return [_part(row) for row in sums.sum(1).tolist()]


def by_length(sums: Tensor) -> dict[str, Part]:
    """The same by length: the longest document of each bucket that has tokens ("longer" behind the last)."""
    names = [*map(str, LONGEST), "longer"]
    return {name: _part(row) for name, row in zip(names, sums.sum(0).tolist(), strict=True) if row[1] or row[3]}


def _part(row: list[float]) -> Part:
    loss, predicted, squares, tokens = row
    return Part(loss=loss / predicted if predicted else None, gradient=math.sqrt(squares / tokens) if tokens else None)
