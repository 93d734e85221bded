"""Exchanges of a given duration on one GPU: stand-ins for Channels whose data stay where they are while a side stream is kept busy.

Two ways to be busy. A copy between pinned host memory and the device, by a copy engine: it takes no multiprocessor and little memory
bandwidth, which is the best that an exchange could do to the compute beside it. A copy kernel on SMS multiprocessors, as NCCL's and
DeepEP's kernels are: it takes those from the products. Neither is a network. Import it after TRITON_INTERPRET is set.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.collectives import Channel

SMS = 20
"""Multiprocessors that the copy kernel takes: what DeepSeek-V3 gave to exchanges (arXiv 2412.19437 section 3.2.2)."""
BLOCK = 4096


@triton.jit
def _copy_kernel(source, target, numbers, BLOCK: tl.constexpr):
    """Few programs that loop: no more multiprocessors than programs."""
    for start in range(tl.program_id(0) * BLOCK, numbers, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(target + place, tl.load(source + place, mask=place < numbers), mask=place < numbers)


def make_copy(kind: str, device: str, largest: int) -> Callable[[int], object]:
    """A function that copies so many fp32 numbers, up to `largest`, on the current stream; `kind`: "copy engine" or "kernel"."""
    on_gpu = device == "cuda"
    target = torch.empty(largest, device=device)
    if kind == "copy engine":
        host = torch.empty(largest, pin_memory=on_gpu)
        return lambda numbers: target[:numbers].copy_(host[:numbers], non_blocking=True)
    if kind != "kernel":
        raise ValueError(f"kind of copy {kind!r} is unknown; choose 'copy engine' or 'kernel'")
    source = torch.empty(largest, device=device)
    return lambda numbers: _copy_kernel[(SMS if on_gpu else 1,)](source, target, numbers, BLOCK=BLOCK, num_warps=8)


class Busy:
    """A stand-in for a Channel of `size` ranks: each exchange is `numbers` of `copy` on a side stream, nothing where it is 0.

    What "arrives" is what was sent: the caller routes evenly, so that as many rows come as go.
    """

    def __init__(self, size: int, copy: Callable[[int], object], numbers: int, device: str) -> None:
        self.rank, self.size, self.copy, self.numbers = 0, size, copy, numbers
        self.side = torch.cuda.Stream() if device == "cuda" else None

    def begin_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], name: str) -> Any:
        if sum(send) != sum(receive):
            raise ValueError(f"{sum(send)} rows go and {sum(receive)} come; route evenly, so that they are as many")
        if self.size == 1 or not self.numbers:
            return SimpleNamespace(finish=lambda: x)
        if self.side is None:  # a CPU has no streams: it copies here
            self.copy(self.numbers)
            return SimpleNamespace(finish=lambda: x)
        side, done = self.side, torch.cuda.Event()
        side.wait_stream(torch.cuda.current_stream())  # what is sent must be there
        with torch.cuda.stream(side):
            self.copy(self.numbers)
            done.record()

        def finish() -> Tensor:
            torch.cuda.current_stream().wait_event(done)
            return x

        return SimpleNamespace(finish=finish)

    def alone(self, times: int) -> None:
        """So many exchanges with nothing beside them."""
        for _ in range(times):
            self.copy(self.numbers)


def groups_of(busy: Busy, alone: Channel | Busy) -> Any:
    """What experts_over_ranks asks of parallel.groups.Groups."""
    return SimpleNamespace(expert=busy, expert_tensor=alone)
