"""Weights, gradients and optimizer state of one pipeline rank, as megatron-core's DDP and distributed optimizer hold them.

Each of up to three buffers (dense weights of the model's dtype, fp32 routers in a bf16 model, experts) holds the weights, and gradients in
fp32; a weight begins at a multiple of 64 numbers, a bucket ends at one of lcm(ranks that share it, 128) (param_and_grad_buffer.py). The
optimizer cuts each over the ranks that have the same weights: data x context for dense ones, expert_data for experts. A rank keeps two fp32
moments of its part, and of bf16 weights the fp32 weight.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from minimax_train.model.config import ModelConfig
from minimax_train.plan import Plan
from parallel.layout import Layout

ALIGNED, BUCKET = 64, 128


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    numbers: int
    """Weights, without what aligns them."""
    shard: int
    """Numbers of the optimizer's part."""


def count_weights(plan: Plan, layout: Layout, chunks: Iterable[range], ranks: int) -> Weights:
    """Of the pipeline rank that holds these chunks of the layers, in a world of `ranks`."""
    model, wide = plan.model, 4 if plan.precision == "fp32" else 2
    data = layout.data(ranks) * layout.context
    expert_data = ranks // layout.pipeline // layout.expert // layout.expert_tensor
    dense, routers, experts = list[int](), list[int](), list[int]()
    for layers in chunks:
        _add(model, layout, layers, dense, routers, experts)
    if plan.precision == "fp32":
        dense, routers = [*dense, *routers], []
    buffers = ((dense, wide, data), (routers, 4, data), (experts, wide, expert_data))
    parameters = gradients = optimizer = shard = 0
    for tensors, bytes_, shared in buffers:
        numbers = _aligned(tensors, shared)
        part = numbers // shared
        parameters, gradients, shard = parameters + bytes_ * numbers, gradients + 4 * numbers, shard + part
        optimizer += part * (12 if bytes_ == 2 else 8)
    return Weights(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        numbers=sum(map(sum, (dense, routers, experts))),
        shard=shard,
    )


def _aligned(tensors: list[int], ranks: int) -> int:
    """Numbers of a buffer in one bucket; several end as one does, but for less than a bucket's divisor each."""
    numbers = sum(-(-size // ALIGNED) * ALIGNED for size in tensors)
    divisor = math.lcm(ranks, BUCKET)
    return -(-numbers // divisor) * divisor


def _add(model: ModelConfig, layout: Layout, layers: range, dense: list[int], routers: list[int], experts: list[int]) -> None:
    """Appends the numbers of each weight of these layers."""
    hidden, width, key_value = model.hidden_size, model.attention_size // layout.tensor, model.key_value_size // layout.tensor
    vocabulary, local = model.vocab_size // layout.tensor, model.num_experts // layout.expert
    expert = local * hidden * (model.expert_ffn_size // layout.expert_tensor)
    if layers.start == 0:
        dense.append(vocabulary * hidden)
    for layer in layers:
        if model.layer_kinds[layer] == "lightning":
            dense += [hidden * 3 * width, hidden * width, width, width * hidden]
        else:
            dense += [hidden * width, hidden * key_value, hidden * key_value, width * hidden]
        dense += [hidden, hidden]
        routers.append(model.num_experts * hidden)
        experts += [2 * expert, expert]
    if layers.stop == model.num_layers:
        dense += [hidden, vocabulary * hidden]
