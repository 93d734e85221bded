"""Tensor parallelism: bf16, logits, checkpoints of another form, refusals. That it changes nothing: test_layouts and test_reshard."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from minimax_train.engine.session import session
from minimax_train.model.row import Row
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import Outcome, hybrid, train
from tests.support import little_model, little_plan


def test_bf16_follows_one_rank(corpus: Path) -> None:
    changes = {"precision": "bf16"}
    one: Outcome = run_ranks(1, train, corpus, Layout(), changes, None, None)[0]
    two: Outcome = run_ranks(2, train, corpus, Layout(tensor=2), changes, None, None)[0]
    for a, b in zip(two.reports, one.reports, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=5e-2)


def load_an_older_one(place: Place, corpus: Path, checkpoint: Path) -> str:
    """What is said of a checkpoint whose optimizer state of out_proj is flat, as earlier versions kept it."""
    from megatron.core import dist_checkpointing

    from minimax_train.engine.storage import read_tensors

    flat = "optimizer.exp_avg.blocks.0.attention.out_proj.weight"
    with session(place=place) as joined:
        from minimax_train.engine.state import optimizer_state, prepare_optimizer
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(little_plan(corpus, model=hybrid()), joined)
        prepare_optimizer(trainer.optimizer)
        state = optimizer_state(trainer.decoder, trainer.optimizer, joined.groups)
        numbers = state[f"{flat}/0"].data.numel()
        old = ShardedTensor(flat, torch.zeros(numbers), torch.float32, (numbers,), (numbers,), (0,), None)
        checkpoint.mkdir()
        dist_checkpointing.save({**state, f"{flat}/0": old}, str(checkpoint), ("torch_dist", 1))
        with pytest.raises(ValueError, match="optimizer") as error:
            read_tensors(state, checkpoint)
        return str(error.value)


def test_a_checkpoint_of_another_form_is_refused(corpus: Path, tmp_path: Path) -> None:
    said = run_ranks(1, load_an_older_one, corpus, tmp_path / "old")[0]
    assert "has [3072] for optimizer.exp_avg.blocks.0.attention.out_proj.weight, where this version keeps [32, 96]" in said
    assert "start.optimizer=fresh" in said


def logits_and_losses(place: Place, layout: Layout, fp32_head: bool) -> tuple[Tensor, Tensor]:
    """Of one row of two documents."""
    with session(layout=layout, place=place) as joined:
        from minimax_train.engine.stage import bare, build_stage

        decoder = bare(build_stage(hybrid(), joined, seed=3, fp32_head=fp32_head))
        row = Row.of_documents([torch.arange(20), torch.arange(100, 144)])
        with torch.no_grad():
            return decoder.logits(row), decoder(replace(row, labels=(row.tokens + 7) % 300))[0]


@pytest.mark.parametrize("fp32_head", [False, True])
def test_every_rank_has_all_logits_and_losses(fp32_head: bool) -> None:
    truth, truth_losses = run_ranks(1, logits_and_losses, Layout(), fp32_head)[0]
    for logits, losses in run_ranks(2, logits_and_losses, Layout(tensor=2), fp32_head):
        assert (logits - truth).norm() < 1e-5 * truth.norm()
        assert (losses - truth_losses).norm() < 1e-5 * truth_losses.norm()


def test_what_the_ranks_cannot_share_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"layout.tensor is 4, which does not divide model.num_key_value_heads 2: use a divisor of 2"):
        little_plan(corpus, layout=Layout(tensor=4))
    with pytest.raises(ValueError, match=r"layout.tensor is 2, which does not divide model.vocab_size 301: use a divisor of 1"):
        little_plan(corpus, model=little_model(vocab_size=301), layout=Layout(tensor=2))
    with pytest.raises(ValueError, match=r"stage '64': length is 64, not a multiple of 3"):
        little_plan(corpus, model=little_model(num_attention_heads=6, num_key_value_heads=3), layout=Layout(tensor=3))
