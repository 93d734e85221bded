"""Initial weights, drawn from (seed, global name): the same model whatever the layout.

MiniMax states Xavier initialisation for all parameters and DeepNorm's beta scaling, not which matrices take it
(arXiv 2501.08313 section 4). Ours: Xavier normal, std = gain * sqrt(2 / (fan_in + fan_out)); the gain is DeepNorm's beta on
values, attention outputs and experts, as DeepNorm's own rule has it (arXiv 2203.00555 section 3), else 1. Norm weights are 1.
"""

import hashlib

import torch
from torch import Tensor, nn

from minimax_train.model.config import ModelConfig, deepnorm_beta
from minimax_train.model.parts import cuts_of, part_of, whole_shape


def _draw(shape: tuple[int, int], gain: float, seed: int, name: str) -> Tensor:
    """One `[fan_out, fan_in]` matrix, fp32, from a generator of its own."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator) * (gain * (2.0 / sum(shape)) ** 0.5)


def initial_weight(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, *, experts: range | None = None) -> Tensor:
    """The whole fp32 tensor called `name` (as in `Decoder.named_parameters`) of shape `shape` at step 0; of stacked experts only
    `experts`, where given."""
    beta = deepnorm_beta(config.num_layers)
    if len(shape) == 1:
        return torch.ones(shape)
    if len(shape) == 3:  # experts, stacked: gate and up (two matrices), or down
        matrices = 2 if name.endswith("gate_up") else 1
        part, drawn = (shape[1] // matrices, shape[2]), experts or range(shape[0])
        return torch.stack([torch.cat([_draw(part, beta, seed, f"{name}/{e}/{m}") for m in range(matrices)]) for e in drawn])
    if name.endswith("qkv_proj.weight"):  # head-major [q|k|v]: three matrices with a gain each, interleaved by head
        heads, size = config.num_attention_heads, config.head_dim
        matrix = (heads * size, shape[1])
        q, k, v = (_draw(matrix, gain, seed, f"{name}/{m}").view(heads, size, -1) for m, gain in (("q", 1.0), ("k", 1.0), ("v", beta)))
        return torch.stack((q, k, v), dim=1).reshape(shape)
    gained = name.endswith(("v_proj.weight", "o_proj.weight", "out_proj.weight"))
    return _draw((shape[0], shape[1]), beta if gained else 1.0, seed, name)


@torch.no_grad()
def initialise(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills every parameter in place: it is drawn whole, and this rank keeps its part; of the experts a rank draws its own alone."""
    for name, parameter in module.named_parameters():
        cuts, experts, held = cuts_of(parameter), None, len(parameter)
        if parameter.dim() == 3:
            first, cuts = cuts[0], cuts[1:]
            experts = range(first.rank * held, (first.rank + 1) * held)
        parameter.copy_(part_of(initial_weight(name, whole_shape(parameter), config, seed, experts=experts), cuts))
