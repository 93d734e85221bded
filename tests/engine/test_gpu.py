"""On a CUDA device: the engine trains the same curve as on the CPU. Never run on a machine without one."""

from pathlib import Path

import pytest
import torch

from minimax_train.engine.session import Device, session
from minimax_train.train.rows import to_row
from tests.support import LittleRows, little_plan


def losses(corpus: Path, device: Device) -> list[float]:
    plan = little_plan(corpus, device=device)
    with session(device) as joined:
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(plan, joined)
        source = LittleRows(plan.data.train)
        return [trainer.step([to_row(source.row(4 * step + i), joined) for i in range(4)], 2e-3).loss for step in range(4)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_follows_cpu(corpus: Path) -> None:
    assert losses(corpus, "cuda") == pytest.approx(losses(corpus, "cpu"), rel=1e-4)
