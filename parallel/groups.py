"""Layout -> process groups, made once by megatron-core and handed on as arguments."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups one rank belongs to."""

    layout: Layout
    world: dist.ProcessGroup
    data: dist.ProcessGroup
    tensor: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return self.world.rank()

    @property
    def size(self) -> int:
        return self.world.size()


def make_groups(layout: Layout, timeout: timedelta = timedelta(minutes=30)) -> Groups:
    """Makes every group of `layout` over the initialised world; every rank calls it. ValueError where it does not fit."""
    from megatron.core import parallel_state

    world = dist.group.WORLD
    assert world is not None, "join the ranks first"
    layout.data(world.size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=int(timeout.total_seconds() // 60),
    )
    return Groups(
        layout=layout,
        world=world,
        data=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tensor=parallel_state.get_tensor_model_parallel_group(),
    )
