"""The gradient's norm by kind of weight: early and late lightning layers, softmax layers, experts, routers, norms, embedding and head.

MiniMax puts the explosions of its context extension down to early layers not keeping up with later ones, whose decay rates differ
(arXiv 2506.13585, section 2); one norm over all would not show it.
"""

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from minimax_train.engine.state import shards
from minimax_train.model.config import ModelConfig
from minimax_train.model.parts import cuts_of
from parallel.collectives import all_sum
from parallel.groups import Groups

KINDS = ("lightning_early", "lightning_late", "softmax", "experts", "routers", "norms", "embedding", "head")


def kind_of(name: str, config: ModelConfig) -> str:
    """The kind of a parameter, by its global name; the first half of the layers is early."""
    if not name.startswith("blocks."):
        return "norms" if name.startswith("norm.") else name.split(".")[0]
    _, number, part, *_ = name.split(".")
    if part != "attention":
        return "norms" if part != "experts" else "routers" if ".router." in name else "experts"
    layer = int(number)
    if config.layer_kinds[layer] == "softmax":
        return "softmax"
    return "lightning_early" if layer < config.num_layers / 2 else "lightning_late"


@torch.no_grad()
def norms_by_kind(
    decoder: nn.Module, optimizer: MegatronOptimizer, config: ModelConfig, groups: Groups, local: Tensor
) -> tuple[dict[str, float], list[float]]:
    """The L2 norm of each kind's gradient over all ranks; their squares sum to the square of the whole norm. And every rank's norm of its
    own gradient: `local` is this rank's square (fp64 scalar). All ranks call it, once the gradient is ready and before it is clipped. One
    sum over the ranks, of eight numbers and one a rank."""
    squares: Tensor | None = None
    for name, parameter, shard, _ in shards(decoder, optimizer):
        grad = shard["param"].grad
        if squares is None:
            squares = torch.zeros(len(KINDS), dtype=torch.float64, device=shard["param"].device)
        dense = getattr(parameter, "allreduce", True)
        if grad is None or (dense and not cuts_of(parameter) and groups.tensor.rank() > 0):
            continue  # every tensor-parallel rank has the same of what is not cut
        squares[KINDS.index(kind_of(name, config))] += grad.float().square().sum()
    if squares is None:  # fewer numbers than ranks
        squares = torch.zeros(len(KINDS), dtype=torch.float64, device=next(decoder.parameters()).device)
    of_ranks = torch.zeros(groups.size, dtype=torch.float64, device=squares.device)
    of_ranks[groups.rank] = local
    total = all_sum(torch.cat([squares, of_ranks]), groups.world).sqrt().tolist()
    return dict(zip(KINDS, total, strict=False)), total[len(KINDS) :]
