"""A stand-in for CUDA, so that megatron-core runs on CPU ranks (gloo).

megatron-core asks for `device="cuda"` tensors, streams and type names. On a machine without CUDA, or when CPU is asked for, one
function mode rewrites those requests and a few inert names answer the rest. Streams that do nothing prove arithmetic, not
ordering: races, NCCL and fused kernels are untested by construction on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode


class CpuForCuda(TorchFunctionMode):
    """Answers requests for CUDA with the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        out = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(out, str):
            out = out.replace("torch.", "torch.cuda.", 1)  # megatron-core's optimizers test for "torch.cuda.FloatTensor"
        return out


class InertStream:
    """A stream on which everything has already happened."""

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


@contextmanager
def cpu_for_cuda() -> Iterator[None]:
    """Inside the `with`, what asks for CUDA gets the CPU; outside nothing is changed."""
    stream = InertStream()
    names: dict[str, Any] = {
        "is_available": lambda: False,
        "current_device": lambda: torch.device("cpu"),
        "current_stream": lambda *a, **k: stream,
        "default_stream": lambda *a, **k: stream,
        "synchronize": lambda *a, **k: None,
        "Stream": InertStream,
    }
    with patch.multiple(torch.cuda, **names), CpuForCuda():
        yield
