"""Silent corruption: weights that should be equal on several ranks, and optimizer state that nobody should have touched.

A bit that flips in a weight changes its norm by too little to see (of 1,000 single flips, 366 in bf16 and 708 in fp32 left an L2 norm as it
was); an integer checksum changes with every one. On CUDA it is the sum over 32- or 16-bit words of word times an odd weight of its place,
mod 2^64: a single flip never cancels, swapped words are seen. On a CPU it is xxh3, which is faster there.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
import xxhash
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from minimax_train.engine.state import shards
from minimax_train.model.parts import cuts_of
from parallel.collectives import from_all
from parallel.groups import Groups

BLOCK = 1 << 22
"""Words summed at a time: what the sum needs of memory is 16 bytes each."""


class Corruption(FloatingPointError):
    """Numbers changed that nothing should have changed; says whose. Going on from the last checkpoint is the remedy."""


@torch.no_grad()
def checksum(x: Tensor) -> Tensor:
    """int64 scalar on x's device; x is contiguous, of 2 or 4 bytes a number."""
    if x.is_cuda:
        return word_sum(x)
    return torch.tensor(xxhash.xxh3_64_intdigest(x.detach().reshape(-1).view(torch.uint8).numpy().data) - (1 << 63))


@torch.no_grad()
def word_sum(x: Tensor) -> Tensor:
    """What `checksum` is on CUDA, on any device."""
    words = x.detach().reshape(-1).view(torch.int32 if x.itemsize == 4 else torch.int16)
    odd = torch.arange(1, 2 * min(BLOCK, len(words)) + 1, 2, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for number, block in enumerate(words.split(BLOCK)):
        total += (block.long() * (odd[: len(block)] + 2 * BLOCK * number)).sum()
    return total


def check_replicas(decoder: nn.Module, groups: Groups) -> None:
    """Corruption on every rank, naming the ranks, where a weight differs from what most ranks have that should have the same; where two
    halves differ, all of them are named. All ranks call it, while the weights are gathered (behind a backward pass)."""
    kinds: dict[str, list[tuple[str, Tensor]]] = {"tensor_data_context": [], "data_context": [], "expert_data": []}
    for name, parameter in decoder.named_parameters():
        dense = getattr(parameter, "allreduce", True)
        kinds["expert_data" if not dense else "data_context" if cuts_of(parameter) else "tensor_data_context"].append((name, parameter))
    found: list[str] = []
    for kind, parameters in kinds.items():
        group = getattr(groups, kind)
        if group.size() > 1 and parameters:
            ours = torch.stack([checksum(parameter) for _, parameter in parameters])
            everyone = ours.new_empty(group.size() * len(ours))
            dist.all_gather_into_tensor(everyone, ours, group=group)
            sums = everyone.view(group.size(), -1).tolist()
            found += odd_ones(sums, dist.get_process_group_ranks(group), [name for name, _ in parameters])
    _raise_for_all(found, groups)


def odd_ones(sums: Sequence[Sequence[int]], ranks: Sequence[int], names: Sequence[str]) -> list[str]:
    """`sums[replica][parameter]` -> a line for each rank that has another weight than more than half of the ranks."""
    wrong: dict[int, list[str]] = {}
    for place, name in enumerate(names):
        counted = Counter(row[place] for row in sums)
        usual, times = counted.most_common(1)[0]
        for rank, row in zip(ranks, sums, strict=True):
            if len(counted) > 1 and (row[place] != usual or 2 * times <= len(ranks)):
                wrong.setdefault(rank, []).append(name)
    return [
        f"rank {rank} of {_few(ranks)} has other numbers in {places[0]}" + (f" and {len(places) - 1} more weights" if places[1:] else "")
        for rank, places in wrong.items()
    ]


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{len(ranks)} ranks"


class Idle:
    """Checksums of this rank's optimizer state, which has no replica: between two steps nobody may touch it."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, int]] | None = None

    def keep(self, decoder: nn.Module, optimizer: MegatronOptimizer) -> None:
        """Behind a step."""
        self._kept = _sums(decoder, optimizer)

    def forget(self) -> None:
        """Where somebody is about to change it: a checkpoint is loaded."""
        self._kept = None

    def check(self, decoder: nn.Module, optimizer: MegatronOptimizer, groups: Groups) -> None:
        """Before the next step; Corruption on every rank where any rank's changed. All ranks call it alike."""
        if self._kept is None:
            return
        now = _sums(decoder, optimizer)
        changed = [name for (name, before), (_, after) in zip(self._kept, now, strict=True) if before != after]
        self._kept = None
        _raise_for_all([f"rank {groups.rank}'s {changed[0]} of the optimizer changed between two steps"] if changed else [], groups)


def _sums(decoder: nn.Module, optimizer: MegatronOptimizer) -> list[tuple[str, int]]:
    named = [
        (f"{kind} of {name}", shard[kind])
        for name, _, shard, _ in shards(decoder, optimizer)
        for kind in ("param", "exp_avg", "exp_avg_sq")
        if kind in shard and shard[kind].numel()
    ]
    if not named:
        return []
    sums = torch.stack([checksum(tensor.detach()) for _, tensor in named]).tolist()
    return [(name, total) for (name, _), total in zip(named, sums, strict=True)]


def _raise_for_all(found: list[str], groups: Groups) -> None:
    everything = sorted({line for lines in from_all(found, groups.world) for line in lines})
    if everything:
        raise Corruption("; ".join(everything))
