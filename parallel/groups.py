"""Layout -> process groups, made once by megatron-core and handed on as arguments."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from parallel.collectives import Channel, wait_for_all
from parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups one rank belongs to."""

    layout: Layout
    world: dist.ProcessGroup
    data: dist.ProcessGroup
    """Ranks with the same part of the model and of a row, each with rows of its own."""
    data_context: dist.ProcessGroup
    """Ranks with the same part of the model: what gradients of dense weights are summed over."""
    tensor: dist.ProcessGroup
    tensor_context: dist.ProcessGroup
    """Ranks that share one row."""
    tensor_data_context: dist.ProcessGroup
    """Ranks with the same layers; those of one row are neighbours."""
    pipeline: dist.ProcessGroup
    """Ranks that hold the layers, each some, of one copy of the model, and work on the same rows."""
    expert_data: dist.ProcessGroup
    """Ranks with the same experts: what gradients of expert weights are summed over."""
    expert: Channel
    """Ranks with different experts, and the same slice of them."""
    expert_tensor: Channel
    """Ranks with different slices of the same experts."""
    expert_block: Channel
    """Both: ranks that hold every expert once, expert-tensor ranks counted first."""
    context: Channel
    key_value: Channel
    """Neighbours among the context ranks that share out the key-value heads."""
    ring: Channel
    """Context ranks with the same key-value heads."""

    @property
    def rank(self) -> int:
        return self.world.rank()

    @property
    def size(self) -> int:
        return self.world.size()


def make_groups(layout: Layout, timeout: timedelta = timedelta(minutes=30), *, late: bool = False) -> Groups:
    """Makes every group of `layout` over the initialised world; every rank calls it. ValueError where it does not fit.

    `late`: channels run every exchange at its `finish`, see collectives.Channel.
    """
    from megatron.core import parallel_state

    world = dist.group.WORLD
    assert world is not None, "join the ranks first"
    layout.data(world.size())
    two_levels = layout.key_value > 1
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        hierarchical_context_parallel_sizes=[layout.key_value, layout.context // layout.key_value] if two_levels else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=int(timeout.total_seconds() // 60),
    )
    context = parallel_state.get_context_parallel_group()
    if two_levels:
        key_value, ring = parallel_state.get_hierarchical_context_parallel_groups()
    else:
        alone = dist.new_group([world.rank()], timeout=timeout, use_local_synchronization=True)  # each rank its own, and no other rank's
        assert alone is not None
        key_value, ring = alone, context
    groups = Groups(
        layout=layout,
        world=world,
        data=parallel_state.get_data_parallel_group(),
        data_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        tensor_context=parallel_state.get_tensor_and_context_parallel_group(),
        tensor_data_context=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
        expert=Channel(parallel_state.get_expert_model_parallel_group(), late=late),
        expert_tensor=Channel(parallel_state.get_expert_tensor_parallel_group(), late=late),
        expert_block=Channel(parallel_state.get_expert_tensor_and_model_parallel_group(), late=late),
        context=Channel(context, late=late),
        key_value=Channel(key_value, late=late),
        ring=Channel(ring, late=late),
    )
    _warm(groups)
    return groups


def _warm(groups: Groups) -> None:
    """Connects every group now, in one order on all ranks: NCCL connects at the first use, and ranks that meet in different orders hang."""
    experts = (groups.expert, groups.expert_tensor, groups.expert_block)
    exchanges = [channel.group for channel in (*experts, groups.context, groups.key_value, groups.ring)]
    shared = [groups.world, groups.data, groups.data_context, groups.tensor, groups.tensor_context, groups.tensor_data_context]
    for group in (*shared, groups.pipeline, groups.expert_data, *exchanges):
        if group.size() > 1:
            wait_for_all(group)
