"""What follows an exchange by Pending.then: on a CPU the thread waits, on a GPU a stream of the channel's own."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.collectives import Pending


def exchange(x: Tensor, result: Tensor, log: list[str], name: str) -> Pending:
    def issue() -> Any:
        log.append(f"begin {name}")

        def wait() -> None:
            log.append(f"finish {name}")
            torch.mul(x, 2, out=result)

        return SimpleNamespace(wait=wait)

    return Pending(result, x, issue, late=False)


def test_on_a_cpu_the_thread_waits() -> None:
    log: list[str] = []
    x = torch.ones(3)
    pending = exchange(x, torch.empty(3), log, "a").then(lambda y: exchange(y + 1, torch.empty(3), log, "b"))
    assert log == ["begin a", "finish a", "begin b"]
    assert torch.equal(pending.finish(), torch.full((3,), 6.0))
    assert torch.equal(Pending(x, x, None, late=False).then(lambda y: exchange(y, torch.empty(3), log, "c")).finish(), 2 * x)


class Network:
    """Exchanges on a stream of their own: each takes some milliseconds and doubles what was sent."""

    def __init__(self) -> None:
        self.stream, self.aside = torch.cuda.Stream(), torch.cuda.Stream()
        self.ends: list[torch.cuda.Event] = []

    def begin(self, x: Tensor) -> Pending:
        result = torch.empty_like(x)

        def issue() -> Any:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(10_000_000)
                torch.mul(x, 2, out=result)
                end = torch.cuda.Event(enable_timing=True)
                end.record()
            self.ends.append(end)
            return SimpleNamespace(wait=lambda: torch.cuda.current_stream().wait_event(end))

        return Pending(result, x, issue, late=False, aside=lambda: self.aside)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("follow", [lambda network, y: network.begin(y + 1), lambda network, y: Pending(y + 1, y, None, late=False)])
def test_on_a_gpu_compute_waits_for_what_it_finishes_alone(follow: Callable[[Network, Tensor], Pending]) -> None:
    """Its work begins before the first exchange is over, and ends after the second. Memory that is freed meanwhile is filled with NaN."""
    network, x = Network(), torch.ones(1 << 20, device="cuda")
    pending = network.begin(x.clone()).then(lambda y: follow(network, y))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(8):
        torch.full_like(x, torch.nan)
    torch.cuda._sleep(100_000_000)
    end.record()
    result = pending.finish()
    assert torch.equal(result, (2 * x + 1) * (2 if len(network.ends) == 2 else 1))
    assert start.elapsed_time(network.ends[0]) > 0
    assert network.ends[-1].elapsed_time(end) > 0
