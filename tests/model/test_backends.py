"""The forms of the operators are chosen once, with the model, and every layer holds that choice."""

import pytest
import torch

from minimax_train.engine import stage
from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.kernels.choice import Backends
from minimax_train.model.decoder import Row
from minimax_train.model.lightning import LightningAttention
from tests.support import little_model


def test_layers_hold_the_choice(alone: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another choice reaches the layers and what they compute with: the same logits by the definition."""
    row = Row.of_documents([torch.arange(20), torch.arange(7)])
    usual = bare(build_stage(little_model(), alone, seed=1))
    assert usual.backends == Backends(lightning="cpu", softmax="sdpa")
    chosen = Backends(lightning="definition", softmax="sdpa")
    monkeypatch.setattr(stage, "best_backends", lambda *_: chosen)
    other = bare(build_stage(little_model(), alone, seed=1))
    assert other.backends == chosen
    layers = [block.attention for block in other.blocks.values() if isinstance(block.attention, LightningAttention)]  # type: ignore[union-attr]
    assert layers
    assert all(layer.backend == "definition" for layer in layers)
    with torch.no_grad():
        a, b = usual.logits(row), other.logits(row)
    assert not torch.equal(a, b)
    assert (a - b).norm() < 1e-5 * b.norm()
