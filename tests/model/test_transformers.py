"""The whole model against transformers' MiniMaxForCausalLM, fp32, where that is right: full rotary, a power-of-two head count."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from minimax_train.convert.config import write_config
from minimax_train.convert.table import table
from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.model.decoder import Decoder
from minimax_train.model.row import Row
from tests.support import little_model


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def pair(alone: Session) -> tuple[Decoder, torch.nn.Module]:
    """Ours and transformers' model with the same weights."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    config = little_model(num_layers=8, pattern=("lightning",) * 7 + ("softmax",), alpha_lightning=2.0, alpha_softmax=2.0)
    ours = bare(build_stage(config, alone, seed=3, rope_base=5e4))
    raw = write_config(config, 5e4, "minimax", "float32", 4096)
    theirs = MiniMaxForCausalLM(MiniMaxConfig(**{k: v for k, v in raw.items() if k != "model_type"}, attn_implementation="eager")).float()
    state = theirs.state_dict()
    parameters = dict(ours.named_parameters())
    with torch.no_grad():
        for entry in table(config, "memory"):
            state[entry.parts[0].name].copy_(parameters[entry.name])
    return ours, theirs


@pytest.mark.parametrize("length", [1, 75, 300, 600])
def test_logits(pair: tuple[Decoder, torch.nn.Module], length: int) -> None:
    ours, theirs = pair
    ids = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False, attention_mask=torch.ones_like(ids)).logits[0]
        assert relative(ours.logits(Row.of_documents([ids[0]])), expected) < 2e-6


def test_every_gradient(pair: tuple[Decoder, torch.nn.Module]) -> None:
    """Same loss, and every parameter's gradient < 1e-5 relative L2; 300 tokens cross transformers' block of 256."""
    ours, theirs = pair
    ids = torch.randint(0, 300, (301,), generator=torch.Generator().manual_seed(5))
    row = Row.of_documents([ids[:-1]])
    losses, _ = ours(row.with_labels(ids[1:]))
    losses.mean().backward()
    logits = theirs(ids[None, :-1], use_cache=False, attention_mask=torch.ones(1, 300, dtype=torch.long)).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, ids[1:])
    loss.backward()
    assert losses.mean().item() == pytest.approx(loss.item(), abs=1e-6)
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    theirs_of = {entry.name: entry.parts[0].name for entry in table(ours.config, "memory")}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert relative(parameter.grad, expected[theirs_of[name]]) < 1e-5, name


def test_the_comparison_sees_a_wrong_rotary(pair: tuple[Decoder, torch.nn.Module], tmp_path: Path) -> None:
    """The tolerance is tight enough: another RoPE base is far outside it."""
    ours, theirs = pair
    ids = torch.randint(0, 300, (1, 75), generator=torch.Generator().manual_seed(1))
    base, ours.rope_base = ours.rope_base, 6e4
    with torch.no_grad():
        expected = theirs(ids, use_cache=False, attention_mask=torch.ones_like(ids)).logits[0]
        error = relative(ours.logits(Row.of_documents([ids[0]])), expected)
    ours.rope_base = base
    assert error > 1e-5
