"""Which layers each pipeline stage holds: neighbours, so shared out that the dearest stage costs as little as it can. Plain arithmetic.

A layer costs its forward FLOPs on a row that is one document (count.py): at long context a softmax layer costs many lightning ones, and
the head counts as part of the last layer. With interleaving a rank holds several chunks, and it is the chunks that are shared out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from minimax_train.model.config import ModelConfig
from minimax_train.model.count import head_flops, layer_flops
from parallel.layout import Layout

UNEVEN = 1.1
"""The dearest stage's cost over the mean's from which a run warns."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The layers of every chunk, in the order of the model; chunk c is on pipeline rank c % ranks."""

    ranks: int
    length: int
    """Tokens of the row that it is balanced for."""
    chunks: tuple[range, ...]
    costs: tuple[int, ...]
    """Forward FLOPs of each chunk for that row."""

    def held(self, rank: int) -> tuple[range, ...]:
        """The chunks of one pipeline rank."""
        return self.chunks[rank :: self.ranks]

    @property
    def imbalance(self) -> float:
        """The dearest rank's cost over the mean's; 1 is even."""
        ranks = [sum(self.costs[rank :: self.ranks]) for rank in range(self.ranks)]
        return max(ranks) * self.ranks / sum(ranks)

    @property
    def warning(self) -> str | None:
        """One line where the stages are uneven, else None."""
        if self.imbalance <= UNEVEN:
            return None
        whole = sum(self.costs)
        parts = ", ".join(f"{part.start}-{part.stop - 1} {cost / whole:.1%}" for part, cost in zip(self.chunks, self.costs, strict=True))
        return (
            f"warning: the dearest of {self.ranks} pipeline stages costs {self.imbalance:.2f} times the mean at length {self.length}, and "
            f"all wait for it (layers and their share of the FLOPs: {parts}): another layout.pipeline may be faster"
        )


def cut_layers(config: ModelConfig, layout: Layout, length: int) -> Cut:
    """The best cut for rows of `length` tokens; the same whenever it is asked for. ValueError where there are fewer layers than chunks."""
    if config.num_layers < layout.chunks:
        raise ValueError(
            f"layout.pipeline {layout.pipeline} x layout.virtual_pipeline {layout.virtual_pipeline} = {layout.chunks} chunks, but "
            f"model.num_layers is {config.num_layers}, and a chunk needs at least one: lower one of them"
        )
    costs = [layer_flops(config, kind, tokens=length, squares=length**2) for kind in config.layer_kinds]
    costs[-1] += head_flops(config, tokens=length)
    chunks = tuple(range(*bounds) for bounds in pairwise(cut_evenly(costs, layout.chunks)))
    return Cut(ranks=layout.pipeline, length=length, chunks=chunks, costs=tuple(sum(costs[i] for i in chunk) for chunk in chunks))


def cut_evenly(costs: Sequence[int], parts: int) -> list[int]:
    """Borders `[parts + 1]` of non-empty runs of `costs`: the dearest run as cheap as can be, and then the sum of squares the least."""
    limit, _ = _best(costs, parts, lambda cost: cost, max)
    _, borders = _best(costs, parts, lambda cost: cost**2 if cost <= limit else math.inf, lambda a, b: a + b)
    return [0, *borders]


def _best(
    costs: Sequence[int], parts: int, grade: Callable[[int], float], add: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The lowest grade of any cut, run after run added up, and its borders; the earliest borders where several are as good."""
    sums = [0, *accumulate(costs)]
    ways: dict[int, tuple[float, tuple[int, ...]]] = {0: (0, ())}  # the best cut of the first n into as many runs as there were rounds
    for left in reversed(range(parts)):
        ends = range(min(ways) + 1, len(costs) - left + 1)
        ways = {end: min((add(ways[n][0], grade(sums[end] - sums[n])), (*ways[n][1], end)) for n in ways if n < end) for end in ends}
    return ways[len(costs)]
