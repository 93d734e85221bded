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
    Or call `then`, for what another exchange sends on.

    A profiler sees both, as "NAME: begin" and "NAME: finish".
    """

    def __init__(
        self,
        result: Tensor,
        sent: Tensor,
        issue: Callable[[], Any] | None,
        *,
        late: bool,
        name: str = "",
        aside: Callable[[], torch.cuda.Stream] | None = None,
    ) -> None:
        """`issue` starts the collective and returns torch's Work; None: there is nobody to talk to, and `result` is ready. `aside`: a
        stream for `then`, asked for on a GPU alone."""
        self._result, self._sent, self._issue, self._name, self._aside = result, sent, issue, name, aside
        self._ready: torch.cuda.Event | None = None
        self._held: tuple[Tensor, ...] = ()
        self._copy = sent.clone() if late and issue is not None else None
        self._work = None
        if late and issue is not None and result.is_floating_point():
            result.fill_(torch.nan)
        elif issue is not None:
            with record_function(f"{name}: begin"):
                self._work = issue()

    def finish(self) -> Tensor:
        """What arrived. RuntimeError in late mode where what was to be sent has been changed since `begin`."""
        if self._ready is not None:
            torch.cuda.current_stream().wait_event(self._ready)
        if self._copy is not None:
            if not torch.equal(self._copy.view(torch.uint8), self._sent.view(torch.uint8)):
                raise RuntimeError("a buffer was changed between begin and finish of the exchange that sends it")
            assert self._issue is not None
            self._work = self._work or self._issue()
        if self._work is not None:
            with record_function(f"{self._name}: finish"):
                self._work.wait()
        self._sent = self._result  # what was sent may go
        self._held = ()
        return self._result

    def then(self, following: Callable[[Tensor], "Pending"]) -> "Pending":
        """Finishes it and begins what sends on what arrived.

        On a GPU both, and what `following` computes in between, happen on a stream of the channel's, so that the stream which calls this
        waits for neither. On a CPU the thread waits, as it does in `finish`. (No GPU has run this yet.)
        """
        if self._aside is None or self._issue is None or not self._result.is_cuda:
            return following(self.finish())
        caller, aside = torch.cuda.current_stream(), self._aside()
        held = (*self._held, self._sent, self._result)
        with torch.cuda.stream(aside):
            pending = following(self.finish())
            pending._ready = aside.record_event()
        # the allocator gives memory on when its own stream is done with it, and two streams use this: what came from the caller's is held
        # until the caller finishes the exchange that follows, and so has waited for all; what came from `aside` is told of the caller
        pending._held = held
        for tensor in (pending._sent, pending._result):
            tensor.record_stream(caller)
        return pending

    def to_host(self) -> "OnHost":
        """Begins to copy what arrives to the host; this stream waits for nothing."""
        return OnHost(self)


class OnHost:
    """What an exchange brings, on its way to the host: `finish` waits for it alone."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._held: tuple[Tensor, ...] = (pending._sent, pending._result)
        self._event: torch.cuda.Event | None = None
        if pending._result.is_cuda:  # on a CPU finishing is waiting: later
            caller = torch.cuda.current_stream()
            aside = pending._aside() if pending._aside is not None and pending._issue is not None else caller
            with torch.cuda.stream(aside):
                x = pending.finish()
                self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                self._event = aside.record_event()

    def finish(self) -> Tensor:
        """The copy, on the host. Call it once."""
        if self._event is None:
            return self._pending.finish()
        self._event.synchronize()
        self._held = ()
        return self._copy


class Channel:
    """One process group for exchanges that overlap with compute. It counts, by name, what this rank sends to others.

    `late` is a test mode: each collective runs at its `finish`, what is received holds NaN until then, and what is sent must not have
    been touched in between. What passes in this mode needs nothing from an exchange before it finishes.
    """

    def __init__(self, group: dist.ProcessGroup, *, late: bool = False) -> None:
        self.group, self.late = group, late
        self._stream: torch.cuda.Stream | None = None
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

        return Pending(result, x, issue, late=self.late, name=name, aside=self._aside)

    def begin_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], name: str) -> Pending:
        """Rank r gets `send[r]` rows of `x` (contiguous) from this one, which gets `receive[r]` rows from r; both in rank order."""
        if self.size == 1:
            return Pending(x, x, None, late=self.late)
        others = sum(send) - send[self.rank]
        self._count(name, others * (x.nbytes // max(len(x), 1)))
        result = x.new_empty((sum(receive), *x.shape[1:]))

        def issue() -> Any:
            return dist.all_to_all_single(result, x, list(receive), list(send), group=self.group, async_op=True)

        return Pending(result, x, issue, late=self.late, name=name, aside=self._aside)

    def _aside(self) -> torch.cuda.Stream:
        """Where what follows this channel's exchanges begins; made at the first use."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream

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
    errors = from_all(error, group)
    failure = error or next((e for e in errors if e is not None), None)
    if failure is not None:
        raise failure


def from_all(value: T, group: dist.ProcessGroup) -> list[T]:
    """Every rank's `value` (small, picklable), in rank order, on every rank."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def to_first(value: T, group: dist.ProcessGroup) -> list[T] | None:
    """Every rank's `value` (picklable), in rank order, on rank 0; None on the others."""
    values: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values
