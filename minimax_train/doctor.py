"""What this machine has that the project can use."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from minimax_train.kernels.choice import best_backends


def examine() -> dict[str, str]:
    """Facts by name; nothing is changed, nothing is timed."""
    memory = psutil.virtual_memory()
    facts = {
        "python": platform.python_version(),
        "processor cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory.total / 2**30:.0f} GiB, {memory.available / 2**30:.0f} GiB free",
        "torch": torch.__version__,
    }
    for package in ("megatron-core", "transformers", "tokenizers"):
        facts[package] = _version(package)
    facts["triton"] = _version("triton")
    facts["transformer-engine"] = "present" if importlib.util.find_spec("transformer_engine") else "absent (used on GPUs when present)"
    facts["apex"] = "present" if importlib.util.find_spec("amp_C") else "absent (used on GPUs when present)"
    facts["flash-attn"] = _version("flash-attn")
    facts["flash-attn 3"] = "present" if importlib.util.find_spec("flash_attn_interface") else "absent (used on Hopper when present)"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = best_backends(device, torch.bfloat16, 128)
    facts["backends"] = f"lightning {choice.lightning}, softmax {choice.softmax} (bf16 heads of 128 on {device})"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    else:
        facts["cuda"] = "none: plans with device=cpu run, on gloo"
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
