"""Talking to other ranks outside megatron-core: the only place that calls a collective."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

T = TypeVar("T")


class Pending:
    """An exchange that was begun; `finish` returns what arrived. Call it once, where the result is used: on a GPU the stream then waits.

    A profiler sees both, as "NAME: begin" and "NAME: finish".
    """

    def __init__(self, result: Tensor, sent: Tensor, issue: Callable[[], Any] | None, *, late: bool, name: str = "") -> None:
        """`issue` starts the collective and returns torch's Work; None: there is nobody to talk to, and `result` is ready."""
        self._result, self._sent, self._issue, self._name = result, sent, issue, name
        self._copy = sent.clone() if late and issue is not None else None
        self._work = None
        if late and issue is not None and result.is_floating_point():
            result.fill_(torch.nan)
        elif issue is not None:
            with record_function(f"{name}: begin"):
                self._work = issue()

    def finish(self) -> Tensor:
        """What arrived. RuntimeError in late mode where what was to be sent has been changed since `begin`."""
        if self._copy is not None:
            if not torch.equal(self._copy.view(torch.uint8), self._sent.view(torch.uint8)):
                raise RuntimeError("a buffer was changed between begin and finish of the exchange that sends it")
            assert self._issue is not None
            self._work = self._work or self._issue()
        if self._work is not None:
            with record_function(f"{self._name}: finish"):
                self._work.wait()
        self._sent = self._result  # what was sent may go
        return self._result


class OnHost:
    """A copy of a tensor on its way to the host: asynchronous on a GPU, and `finish` waits for it alone."""

    def __init__(self, x: Tensor) -> None:
        self._event = None
        self._copy = x
        if x.device.type == "cuda":
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def finish(self) -> Tensor:
        """The copy, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


class Channel:
    """One process group for exchanges that overlap with compute. It counts, by name, what this rank sends to others.

    `late` is a test mode: each collective runs at its `finish`, what is received holds NaN until then, and what is sent must not have
    been touched in between. What passes in this mode needs nothing from an exchange before it finishes.
    """

    def __init__(self, group: dist.ProcessGroup, *, late: bool = False) -> None:
        self.group, self.late = group, late
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def begin_all_gather(self, x: Tensor, name: str) -> Pending:
        """`x` of every rank (one shape, contiguous) -> `[ranks, *x.shape]`."""
        if self.size == 1:
            return Pending(x[None], x, None, late=self.late)
        self._count(name, x.nbytes * (self.size - 1))
        result = x.new_empty((self.size, *x.shape))
        flat = result.flatten(0, 1)  # gloo wants one rank after the other, not stacked

        def issue() -> Any:
            return dist.all_gather_into_tensor(flat, x, group=self.group, async_op=True)

        return Pending(result, x, issue, late=self.late, name=name)

    def begin_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], name: str) -> Pending:
        """Rank r gets `send[r]` rows of `x` (contiguous) from this one, which gets `receive[r]` rows from r; both in rank order."""
        if self.size == 1:
            return Pending(x, x, None, late=self.late)
        others = sum(send) - send[self.rank]
        self._count(name, others * (x.nbytes // max(len(x), 1)))
        result = x.new_empty((sum(receive), *x.shape[1:]))

        def issue() -> Any:
            return dist.all_to_all_single(result, x, list(receive), list(send), group=self.group, async_op=True)

        return Pending(result, x, issue, late=self.late, name=name)

    def _count(self, name: str, sent: int) -> None:
        self.bytes[name] += sent
        self.calls[name] += 1


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
