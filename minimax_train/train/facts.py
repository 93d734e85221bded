"""What ran where: `run.json`, for the log and the report."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from data.batches import Row, unigram_entropy
from minimax_train.engine.trainer import Trainer
from minimax_train.model.count import count_parameters
from minimax_train.train.peak import Peak


def facts(trainer: Trainer, peak: Peak, held_out: dict[int, list[Row]]) -> dict[str, Any]:
    """Machine, versions, model and held-out rows (by length) of a run."""
    plan, device, backends = trainer.plan, trainer.session.device, trainer.decoders[0].backends
    count = count_parameters(plan.model)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "ranks": trainer.session.groups.size,
        "threads_per_rank": torch.get_num_threads(),
        "precision": plan.precision,
        "lightning_backend": backends.lightning,
        "softmax_backend": backends.softmax,
        "experts_backend": backends.experts,
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "parameters": count.total,
        "active_parameters": count.active,
        "peak_flops": peak.flops,
        "peak_flops_source": peak.source,
        "unigram_entropy": unigram_entropy(held_out[plan.stages[-1].length]),
        "validation_tokens": {str(length): sum(len(row.tokens) for row in rows) for length, rows in sorted(held_out.items())},
    }
