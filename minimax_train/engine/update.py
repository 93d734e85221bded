"""An optimizer step in two halves, so that somebody may look at the gradient's norm in between and leave the second one out.

They are what megatron-core's `optimizer.step()` does in one (0.16: prepare, norm, clip, step), by its public parts.
"""

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from minimax_train.engine.state import parts_of


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The L2 norm of the gradient over all ranks, the same on each, before clipping. The gradient is ready for `update`."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def update(optimizer: MegatronOptimizer, norm: float, clip: float) -> None:
    """Clips the gradient to the norm `clip` (0: not at all) and takes the step."""
    for part in parts_of(optimizer):
        parameters = part.get_parameters()
        if clip > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
    optimizer.step_with_ready_grads()
