"""What several evaluations judge."""

from pathlib import Path

import pytest
import torch

from minimax_train.checkpoint.record import Progress, Record
from minimax_train.checkpoint.store import save
from minimax_train.engine.session import session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.engine.state import model_state
from parallel.testing import run_ranks
from parallel.world import Place
from tests.support import little_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of drawn weights: norms that differ, half of each head turned, a sharp head that is sure of what it says."""
    final = tmp_path_factory.mktemp("checkpoint") / "ckpt"
    run_ranks(1, _write, final)  # in a process of its own: some tests have a session, some must not
    return final


def _write(place: Place, final: Path) -> None:
    with session(place=place) as alone, torch.no_grad():
        config, draws = little_model(rotary_dim=8), torch.Generator().manual_seed(5)
        model = bare(build_stage(config, alone, seed=3))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=draws)
        model.head.weight.mul_(3)
        record = Record(model=config, rope_base=500.0, max_positions=64, precision="fp32", progress=Progress(step=7), optimizer_steps=None)
        save(final, model_state(model, alone.groups), record, alone.groups)
