"""Weights and optimizer state as named, sharded tensors, for megatron-core's dist_checkpointing.

Names are global and say nothing of the layout: `model.NAME` is the whole parameter; `optimizer.{param,exp_avg,exp_avg_sq}.NAME` are
fp32 and of the whole parameter too, flattened, but for the weights that a layout can cut along another axis than the first (out_proj,
o_proj, experts): these are `[rows, columns]`, the columns being what lies from that axis on, of one of the matrices stacked along it. A
distributed optimizer's shard is a range of the rank's flattened parameter: in the flattened whole that is a range as well, but not where
columns are cut; there it is up to three rectangles (the end of a row, whole rows, the beginning of one). megatron-core's own optimizer
formats are not used: its reshardable one corrupts weights with several padded buckets, its other one follows the buckets.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from minimax_train.model.parts import Cut, cuts_of
from parallel.groups import Groups

MOMENTS = ("param", "exp_avg", "exp_avg_sq")
Sharded = dict[str, ShardedTensor]


def model_state(decoder: nn.Module, groups: Groups) -> Sharded:
    """The weights under their global names; of the ranks with the same part, one is marked as the one that writes."""
    state = {}
    for name, parameter in decoder.named_parameters():
        key, cuts = f"model.{name}", cuts_of(parameter)
        if getattr(parameter, "allreduce", True):
            replica = (0 if cuts else groups.tensor.rank(), groups.data_context.rank())
        else:
            replica = (0, groups.expert_data.rank())
        stacked = next((cut for cut in cuts if cut.matrices > 1 and cut.ranks > 1), None)
        matrices = parameter.data.chunk(stacked.matrices, stacked.axis) if stacked else [parameter.data]
        for number, matrix in enumerate(matrices):  # a rank's slices of stacked matrices do not lie side by side in the whole
            places = [
                (c.axis, number * c.ranks + c.rank, c.matrices * c.ranks) if c is stacked else (c.axis, c.rank, c.ranks) for c in cuts
            ]
            state[f"{key}/{number}" if stacked else key] = ShardedTensor.from_rank_offsets(key, matrix, *places, replica_id=replica)
    return state


def optimizer_state(decoder: nn.Module, optimizer: MegatronOptimizer, groups: Groups) -> Sharded:
    """This rank's part of fp32 weights and moments; the tensors are the optimizer's own, so that loading fills them in place. Of what all
    tensor-parallel ranks have, the first is marked as the one that writes."""
    state = {}
    for name, parameter, shard, start in shards(decoder, optimizer):
        for kind in MOMENTS:
            key, tensor = f"optimizer.{kind}.{name}", shard[kind].detach()
            for number, box in enumerate(_boxes(parameter, start, start + len(tensor))):
                data = tensor[box.first : box.first + math.prod(box.shape)].view(box.shape)
                uncut = getattr(parameter, "allreduce", True) and not cuts_of(parameter)
                state[f"{key}/{number}"] = ShardedTensor(
                    key,
                    data,
                    data.dtype,
                    box.shape,
                    box.whole,
                    box.offset,
                    axis_fragmentations=None,
                    replica_id=groups.tensor.rank() if uncut else 0,
                )
    return state


@dataclass(frozen=True, kw_only=True)
class _Box:
    """Consecutive numbers of a shard, and where they lie in the stored whole."""

    first: int
    """Their place in the shard."""
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    whole: tuple[int, ...]


def _boxes(parameter: Tensor, start: int, end: int) -> Iterator[_Box]:
    """The range [start, end) of a rank's flattened parameter as boxes of the whole parameter."""
    uncut = Cut(axis=0, rank=0, ranks=1)
    first = next((cut for cut in cuts_of(parameter) if cut.axis == 0), uncut)
    inner = next((cut for cut in cuts_of(parameter) if cut.axis > 0), None)
    if inner is None:
        size = parameter.numel()
        yield _Box(first=0, shape=(end - start,), offset=(first.rank * size + start,), whole=(first.ranks * size,))
        return
    columns = math.prod(parameter.shape[inner.axis :]) // inner.matrices
    rows = parameter.numel() // columns
    whole = (first.ranks * rows, inner.ranks * columns)
    at = start
    while at < end:
        row, column = divmod(at, columns)
        whole_rows = 0 if column else (end - at) // columns
        shape = (whole_rows, columns) if whole_rows else (1, min(columns - column, end - at))
        yield _Box(first=at - start, shape=shape, offset=(first.rank * rows + row, inner.rank * columns + column), whole=whole)
        at += shape[0] * shape[1]


def prepare_optimizer(optimizer: MegatronOptimizer) -> None:
    """Makes the moments exist (zero) before a checkpoint is loaded into them; no weight changes."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter.data), torch.zeros_like(parameter.data)


def optimizer_steps(optimizer: MegatronOptimizer) -> int:
    """Steps Adam has taken: its bias correction depends on them."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:  # apex and Transformer Engine
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in part.optimizer.state[parameter]:  # torch
                    return int(part.optimizer.state[parameter]["step"])
    return 0


def set_optimizer_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """The counterpart of optimizer_steps, for a restored optimizer; every parameter gets a step tensor of its own."""
    for part in parts_of(optimizer):
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


def parts_of(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers that it is made of: of dense and of expert weights."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def shards(decoder: nn.Module, optimizer: MegatronOptimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor], int]]:
    """(name, parameter, this rank's shard of its state, where the shard starts in the flattened parameter).

    megatron-core's own map from parameter to main parameter (model_param_group_index_map) is not used: in a group that mixes fp32 and
    bf16 parameters, as routers and the rest do here, it points at the wrong ones.
    """
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    for part in parts_of(optimizer):
        pairs = ((part.model_float16_groups, part.shard_fp32_from_float16_groups), (part.model_fp32_groups, part.shard_fp32_groups))
        for parameters, mains in ((p, m) for models, shards in pairs for p, m in zip(models, shards, strict=True)):
            for parameter, main in zip(parameters, mains, strict=True):
                place = part._get_model_param_range_map(parameter)["param"]
                yield names[parameter], parameter, {"param": main, **part.optimizer.state[main]}, place.start
