"""A session: this process joined to its ranks on a device, with its process groups, for as long as the `with` lasts."""

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from minimax_train.engine.cpu import cpu_for_cuda
from minimax_train.engine.gloo import plain_gathers
from parallel.groups import Groups, make_groups
from parallel.layout import Layout
from parallel.world import Place, joined, meet

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Session:
    """What every verb that runs the model needs to know of the machine."""

    place: Place
    groups: Groups
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self.place.rank == 0


@contextmanager
def session(
    device: Device = "cpu",
    layout: Layout | None = None,
    place: Place | None = None,
    *,
    store: dist.Store | None = None,
    number: int = 0,
    late: bool = False,
    deterministic: bool = False,
) -> Iterator[Session]:
    """Joins the ranks (NCCL on CUDA, gloo on CPU) and makes the groups of `layout`; everything is undone on leaving.

    `store`, `number`: of a process that has several sessions one after the other, what `parallel.world.meet` gave, and which one it is.
    `late`: the test mode of parallel.collectives.Channel. `deterministic`: as Plan says; the environment must fit, see STEADY.
    """
    place, layout = place or Place(), layout or Layout()
    store = store or meet(place)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"megatron\..*")  # that Transformer Engine and apex are absent is no news on a CPU
        warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex|full scope is deprecated).*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")  # names megatron-core 0.16 still calls
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")  # DDP looks at what it owns
        logging.getLogger("megatron").setLevel(logging.WARNING)  # never higher: some warnings are the only sign of a corrupt checkpoint
        if device == "cpu":
            stack.enter_context(cpu_for_cuda())
            stack.enter_context(plain_gathers())
        else:
            torch.cuda.set_device(place.local_rank)
            stack.callback(setattr, torch.backends.cuda.matmul, "allow_tf32", torch.backends.cuda.matmul.allow_tf32)
            torch.backends.cuda.matmul.allow_tf32 = False  # NVIDIA's containers switch it on: states and scores would keep 10 bits
        if deterministic:
            stack.enter_context(_same_bits())
        stack.enter_context(joined(place, "gloo" if device == "cpu" else "nccl", store, name=f"world-{number}"))
        groups = make_groups(layout, late=late)
        stack.callback(_forget_groups)
        yield Session(place=place, groups=groups, device=torch.device(device, *(() if device == "cpu" else (place.local_rank,))))


STEADY = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
"""What the environment of a deterministic run holds before CUDA is used: cuBLAS chooses no algorithm by its workspace, NCCL adds in one
order."""


@contextmanager
def _same_bits() -> Iterator[None]:
    """torch refuses operators that may give other bits the next time. Fresh memory is not filled: nothing of ours reads it."""
    memory: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled


def _forget_groups() -> None:
    """megatron-core keeps its groups in module state; the next session in this process makes its own."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    gc.collect()  # what the session held of the device is free for the next one: buckets and hooks hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
