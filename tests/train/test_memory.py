"""A rank that runs out of memory says which, where and what to do; nothing half-done is kept."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minimax_train.checkpoint.shelf import checkpoints_in, newest_verified
from minimax_train.engine.session import session
from minimax_train.engine.trainer import Trainer
from minimax_train.plan import Checkpoints
from minimax_train.train.loop import train
from tests.support import little_plan


def test_out_of_memory(corpus: Path, tmp_path: Path) -> None:
    plan, run, taken = little_plan(corpus, checkpoints=Checkpoints(every_steps=2, keep=3, asynchronous=False)), tmp_path / "run", 0

    def scarce(self: Trainer, *arguments: Any, **named: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 4:
            self.decoders[0].blocks["2"].register_forward_hook(full)
        return step(self, *arguments, **named)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    with session() as alone, pytest.MonkeyPatch.context() as patch:
        step = Trainer.step
        patch.setattr(Trainer, "step", scarce)
        said = r"rank 0 ran out of memory in step 4 \(stage 64, 64 tokens a row\): .*recompute=full.*Tried to allocate 2.00 GiB"
        with pytest.raises(MemoryError, match=said):
            train(plan, run, alone)
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["step-00000002"]
    assert newest_verified(run / "checkpoints")[1] == {}
    with session() as alone:
        assert train(plan, run, alone).step == 9
    assert re.search(r'"step": 4,', (run / "metrics.jsonl").read_text())
