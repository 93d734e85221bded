"""gloo's coalesced all-gather, one gather at a time.

megatron-core's overlapped parameter gather goes through torch's coalescing manager, and on gloo what the manager then calls corrupts the
heap: torch 2.13.0 died in a gloo worker thread ("malloc(): unaligned tcache chunk detected", SIGABRT or SIGSEGV) in 4 of 5
loops of 60 to 120 s, and a rank in one of a few hundred little runs. Plain all-gathers, 1.7 million in one loop, did not. See
pytorch/pytorch#65231 and #65237.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

NAMES = ("all_gather_single_coalesced", "allgather_into_tensor_coalesced")
"""Of the method, in torch 2.13 and before."""


class Gathers:
    """Several gathers under way; waited for together, as torch's Work is."""

    def __init__(self, works: Sequence[Any]) -> None:
        self.works = works

    def wait(self) -> None:
        """Returns when all have arrived."""
        for work in self.works:
            work.wait()


def gather_one_by_one(group: dist.ProcessGroup, outputs: Sequence[Tensor], inputs: Sequence[Tensor], options: Any) -> Gathers:
    """Begins, for each i, the gather of every rank's `inputs[i]` into `outputs[i]`; `options` are torch's AllgatherOptions."""
    return Gathers([group._allgather_base(output, x, options) for output, x in zip(outputs, inputs, strict=True)])


@contextmanager
def plain_gathers() -> Iterator[None]:
    """Inside the `with`, what is coalesced gathers one by one; outside nothing is changed."""
    name = next(name for name in NAMES if hasattr(dist.ProcessGroup, name))
    with patch.object(dist.ProcessGroup, name, gather_one_by_one):
        yield
