"""A short conversation of all ranks before work begins: sums that are known beforehand, and bytes handed round a ring.

Finds what does not connect, hangs, or delivers other bytes than were sent. The bandwidths are told; they are the best of a few tries on an
otherwise idle machine, no benchmark.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.world import Place

SIZES = {"cpu": (1 << 12, 1 << 20, 1 << 23), "cuda": (1 << 12, 1 << 20, 1 << 26, 1 << 28)}
"""Bytes of a message."""
TRIES = 3
PERIOD = 7
Tell = Callable[[str], None]


def converse(place: Place, device: torch.device, sizes: Sequence[int], tell: Tell) -> tuple[list[str], float]:
    """What this rank found wrong, and the bandwidth (GB/s) of the largest all-reduce. All ranks of the default group call it together.

    Whatever a rank finds, it takes part to the end, so that no other is kept waiting.
    """
    wrong: list[str] = []
    rate = 0.0
    for size in sizes:
        found, rate = _sum(place, device, size)
        tell(f"all-reduce of {size:,} bytes: {rate:.3g} GB/s")
        wrong += found
        if place.size > 1:
            found, handed = _ring(place, device, size)
            tell(f"ring of {size:,} bytes: {handed:.3g} GB/s")
            wrong += found
    return wrong, rate


def _sum(place: Place, device: torch.device, size: int) -> tuple[list[str], float]:
    """The sum over ranks r of (r + 1) (1 + i mod 7), exact in int32; bandwidth 2 (n-1)/n size/time, as NCCL's tests count it."""
    step = 1 + torch.arange(size // 4, device=device, dtype=torch.int32) % PERIOD
    expected = step * (place.size * (place.size + 1) // 2)
    seconds, wrong = float("inf"), 0
    for _ in range(TRIES):
        numbers = step * contribution(place.rank)
        begin = _now(device)
        dist.all_reduce(numbers)
        seconds = min(seconds, _now(device) - begin)
        wrong = max(wrong, int((numbers != expected).sum()))
    said = [f"all-reduce of {size:,} bytes: {wrong:,} of {size // 4:,} sums are wrong"] if wrong else []
    return said, 2 * (place.size - 1) / place.size * size / seconds / 1e9


def _ring(place: Place, device: torch.device, size: int) -> tuple[list[str], float]:
    """Every rank sends to the next one and knows what the one before it should have sent."""
    before, after = (place.rank - 1) % place.size, (place.rank + 1) % place.size
    sent, expected = content(place.rank, size, device), content(before, size, device)
    got = torch.empty_like(expected)
    seconds, wrong = float("inf"), 0
    for _ in range(TRIES):
        got.fill_(0)
        begin = _now(device)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, got, before)]):
            work.wait()
        seconds = min(seconds, _now(device) - begin)
        wrong = max(wrong, int((got != expected).sum()))
    said = [f"ring of {size:,} bytes: {wrong:,} bytes from rank {before} are wrong"] if wrong else []
    return said, size / seconds / 1e9


def contribution(rank: int) -> int:
    """This rank's factor in the sums."""
    return rank + 1


def content(rank: int, size: int, device: torch.device) -> Tensor:
    """What a rank sends: uint8, another byte in every rank, place and block of 4,096."""
    place, block = (torch.arange(n, device=device) for n in (1 << 12, -(-size // (1 << 12))))
    first = ((place * (2 * rank + 3) + rank) % 251).to(torch.uint8)
    return (first[None, :] + block.to(torch.uint8)[:, None]).flatten()[:size]


def _now(device: torch.device) -> float:
    """Seconds, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
