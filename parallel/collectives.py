"""Talking to other ranks outside megatron-core: the only place that calls a collective."""

from collections.abc import Callable
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


def first_does(work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Rank 0 runs `work`, all ranks get its result; a ValueError or OSError it raises is raised on every rank alike.

    For what touches files once: preparing, checking, choosing. No rank is left waiting for another that gave up.
    """
    outcome: tuple[T | None, Exception | None] = (None, None)
    if group.rank() == 0:
        try:
            outcome = (work(), None)
        except (ValueError, OSError) as error:
            outcome = (None, error)
    value, failure = from_first(outcome, group)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def raise_together(error: Exception | None, group: dist.ProcessGroup) -> None:
    """Raises on every rank when any rank has an error: the rank's own, or the first other's (its type and text)."""
    errors: list[Exception | None] = [None] * group.size()
    dist.all_gather_object(errors, error, group=group)
    failure = error or next((e for e in errors if e is not None), None)
    if failure is not None:
        raise failure
