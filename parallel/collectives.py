"""Talking to other ranks outside megatron-core: the only place that calls a collective."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def all_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `x` over the group, on every rank; `x` is left alone."""
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


def from_first(value: T, group: dist.ProcessGroup) -> T:
    """Rank 0's `value` (small, picklable), on every rank; the others' argument is ignored."""
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def wait_for_all(group: dist.ProcessGroup) -> None:
    """Returns when every rank of the group has called it."""
    all_sum(torch.zeros(1, device=torch.device("cuda", torch.cuda.current_device()) if group.name() == "nccl" else "cpu"), group)
