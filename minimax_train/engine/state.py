"""Weights and optimizer state as named, sharded tensors, for megatron-core's dist_checkpointing.

Names are global and say nothing of the layout: `model.NAME` has the parameter's shape; `optimizer.{param,exp_avg,exp_avg_sq}.NAME`
are fp32 and flat (a distributed optimizer's shard is a range of the flattened parameter, whatever the buckets). megatron-core's own
optimizer formats are not used: its reshardable one corrupts weights with several padded buckets, its other one follows the buckets.
"""

from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from minimax_train.model.decoder import Decoder
from parallel.groups import Groups

MOMENTS = ("param", "exp_avg", "exp_avg_sq")
Sharded = dict[str, ShardedTensor]


def model_state(decoder: Decoder, groups: Groups) -> Sharded:
    """The weights under their global names; replicas over data-parallel ranks are marked so that one of them writes."""
    replica = groups.data_context.rank()
    return {
        f"model.{name}": ShardedTensor.from_rank_offsets(f"model.{name}", parameter.data, replica_id=replica)
        for name, parameter in decoder.named_parameters()
    }


def optimizer_state(decoder: Decoder, optimizer: MegatronOptimizer) -> Sharded:
    """This rank's ranges of fp32 weights and moments; the tensors are the optimizer's own, so that loading fills them in place."""
    state = {}
    for name, parameter, shard, start in _shards(decoder, optimizer):
        for kind in MOMENTS:
            key = f"optimizer.{kind}.{name}"
            tensor = shard[kind]
            state[key] = ShardedTensor(
                key, tensor.detach(), tensor.dtype, tuple(tensor.shape), (parameter.numel(),), (start,), axis_fragmentations=None
            )
    return state


def prepare_optimizer(optimizer: MegatronOptimizer) -> None:
    """Makes the moments exist (zero) before a checkpoint is loaded into them; no weight changes."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter.data), torch.zeros_like(parameter.data)


def optimizer_steps(optimizer: MegatronOptimizer) -> int:
    """Steps Adam has taken: its bias correction depends on them."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:  # apex and Transformer Engine
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in part.optimizer.state[parameter]:  # torch
                    return int(part.optimizer.state[parameter]["step"])
    return 0


def set_optimizer_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """The counterpart of optimizer_steps, for a restored optimizer; every parameter gets a step tensor of its own."""
    for part in _parts(optimizer):
        keeps_in_state = isinstance(part.optimizer, torch.optim.AdamW)
        for group in part.optimizer.param_groups:
            if not keeps_in_state:
                group["step"] = steps
                continue
            for parameter in group["params"]:
                part.optimizer.state[parameter]["step"] = torch.tensor(float(steps))


@torch.no_grad()
def adopt_weights(optimizer: MegatronOptimizer) -> None:
    """Takes the model's weights as the optimizer's fp32 ones: after weights alone were loaded."""
    optimizer.reload_model_params()


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _shards(decoder: Decoder, optimizer: MegatronOptimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor], int]]:
    """(name, parameter, this rank's shard of its state, where the shard starts in the flattened parameter).

    megatron-core's own map from parameter to main parameter (model_param_group_index_map) is not used: in a group that mixes fp32 and
    bf16 parameters, as routers and the rest do here, it points at the wrong ones.
    """
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    for part in _parts(optimizer):
        pairs = ((part.model_float16_groups, part.shard_fp32_from_float16_groups), (part.model_fp32_groups, part.shard_fp32_groups))
        for parameters, mains in ((p, m) for models, shards in pairs for p, m in zip(models, shards, strict=True)):
            for parameter, main in zip(parameters, mains, strict=True):
                place = part._get_model_param_range_map(parameter)["param"]
                yield names[parameter], parameter, {"param": main, **part.optimizer.state[main]}, place.start
