"""megatron-core's gathers of updated weights never reach gloo's coalesced all-gather, which kills a rank now and then."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from minimax_train.engine.gloo import NAMES, gather_one_by_one
from minimax_train.engine.session import session
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.support import little_plan


def gathered(place: Place) -> list[torch.Tensor]:
    """What the coalescing manager brings of two tensors a rank."""
    with session(layout=Layout(), place=place) as joined:
        mine = [torch.full((2,), float(place.rank)), torch.full((3,), 10.0 + place.rank)]
        everyone = [torch.full((x.numel() * place.size,), torch.nan) for x in mine]
        with distributed_c10d._coalescing_manager(joined.groups.data, async_ops=True) as manager:
            for out, x in zip(everyone, mine, strict=True):
                dist.all_gather_into_tensor(out, x, group=joined.groups.data, async_op=True)
        manager.wait()
        return everyone


def test_coalesced_gathers_bring_the_same() -> None:
    for two, three in run_ranks(2, gathered):
        assert two.tolist() == [0, 0, 1, 1]
        assert three.tolist() == [10, 10, 10, 11, 11, 11]


def calls_in_two_steps(place: Place, corpus: Path) -> int:
    """How often training calls what stands in for the coalesced gather; the real one would end the test."""
    from minimax_train.engine.trainer import Trainer
    from minimax_train.train.rows import to_row
    from tests.engine.equality import packed

    torch.set_num_threads(1)
    calls = 0

    def counted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return gather_one_by_one(*arguments)  # type: ignore[arg-type]

    with session(layout=Layout(), place=place) as joined, pytest.MonkeyPatch.context() as patched:
        name = next(name for name in NAMES if hasattr(dist.ProcessGroup, name))
        assert getattr(dist.ProcessGroup, name) is gather_one_by_one
        patched.setattr(dist.ProcessGroup, name, counted)
        trainer = Trainer(little_plan(corpus), joined)
        for step in range(2):
            trainer.step([to_row(packed([0, 40, 64], step), joined)], 1e-3)
        trainer.settle()
    assert getattr(dist.ProcessGroup, name) is not gather_one_by_one, "the session's end leaves torch as it was"
    return calls


def test_weights_are_gathered_one_by_one(corpus: Path) -> None:
    assert run_ranks(1, calls_in_two_steps, corpus)[0] >= 2
