"""Each rank's own gradient, before it is summed with others': whose it was when the sum is no number, or stands out.

Behind the sum every rank has the same numbers, a NaN too. megatron-core's DDP sums a bucket of gradients as soon as it is full; here each
bucket is looked at right before, once a step, and nothing is read back from the device.
"""

from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from parallel.collectives import from_all
from parallel.groups import Groups

FARTHEST = 4.0
"""Times the norm of the median rank with the same layers from which a rank is named."""


class LocalGradients:
    """The norms of a rank's own gradients, of one step."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], decoder: nn.Module) -> None:
        """Looks into every bucket of `chunks` from now on; `decoder` gives the parameters their names."""
        parameters = list(decoder.named_parameters())
        self._names = [name for name, _ in parameters]
        self._places = {parameter: place for place, (_, parameter) in enumerate(parameters)}
        self.norms = torch.zeros(len(parameters), device=parameters[0][1].device)
        """`[parameters]` fp32: of the sum over the rank's rows."""
        for chunk in chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                self._look_before(group)

    def _look_before(self, group: object) -> None:
        begin = group.start_grad_sync  # type: ignore[attr-defined]

        def look_and_begin(*arguments: bool, **named: bool) -> None:
            if group.grad_reduce_handle is None:  # type: ignore[attr-defined]
                for parameter in group.params:  # type: ignore[attr-defined]
                    self.norms[self._places[parameter]] = torch.linalg.vector_norm(parameter.main_grad)
            begin(*arguments, **named)

        group.start_grad_sync = look_and_begin  # type: ignore[attr-defined]

    def square(self) -> Tensor:
        """Of the norm over all of this rank's parameters: a fp64 scalar on the device."""
        return self.norms.double().square().sum()

    def blame(self, of_ranks: Sequence[float], groups: Groups) -> list[str]:
        """Ranks whose gradient is no number, or far above that of the ranks with the same layers and rows of their own, and in which
        parameter. All ranks call it, with the same norms `of_ranks`; what they find is the same on all."""
        rank, mine = groups.rank, of_ranks[groups.rank]
        others = [of_ranks[other] for other in dist.get_process_group_ranks(groups.data_context)]
        found = None
        bad = [name for name, norm in zip(self._names, self.norms.tolist(), strict=True) if norm - norm != 0]  # infinite, or no number
        if bad:
            found = f"the gradient of rank {rank} was no number before it was summed, in {bad[0]} and {len(bad) - 1} more parameters"
        elif len(others) > 2 and mine > FARTHEST * median(others):
            worst = self._names[int(self.norms.argmax())]
            found = f"the gradient of rank {rank} was {mine / median(others):.1f} times the median rank's, most of all in {worst}"
        return [said for said in from_all(found, groups.world) if said is not None]
