"""Tensor parallelism changes nothing: losses, every gradient, their norm, auxiliary loss, optimizer steps, checkpoints."""

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
from tests.engine.equality import Outcome, hybrid, same, train
from tests.support import little_model, little_plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after STEPS steps, under the number of ranks that wrote them."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def one_rank(corpus: Path, saved: Path) -> Outcome:
    outcome: Outcome = run_ranks(1, train, corpus, Layout(), {}, None, saved / "1")[0]
    return outcome


@pytest.fixture(scope="module")
def two_ranks(corpus: Path, saved: Path) -> list[Outcome]:
    return run_ranks(2, train, corpus, Layout(tensor=2), {}, None, saved / "2")


@pytest.fixture(scope="module")
def four_ranks(corpus: Path, saved: Path) -> Outcome:
    """Tensor 2, data 2, so that a rank has parts of rows of the weights that are cut along their columns."""
    outcome: Outcome = run_ranks(4, train, corpus, Layout(tensor=2), {}, None, saved / "4")[3]
    return outcome


def test_two_ranks_equal_one(one_rank: Outcome, two_ranks: list[Outcome]) -> None:
    assert one_rank.reports[0].grad_norm > 0.1
    for ours in two_ranks:
        same(ours, one_rank)


def test_tensor_and_data_parallel_equal_one(one_rank: Outcome, four_ranks: Outcome) -> None:
    same(four_ranks, one_rank)


def test_a_head_a_rank_equals_one(corpus: Path, one_rank: Outcome) -> None:
    same(run_ranks(4, train, corpus, Layout(tensor=4), {}, None, None)[3], one_rank)


@pytest.mark.parametrize(("writer", "layout", "ranks"), [("4", Layout(), 1), ("2", Layout(), 2), ("1", Layout(tensor=2), 2)])
def test_checkpoint_of_another_layout(
    corpus: Path, saved: Path, one_rank: Outcome, two_ranks: list[Outcome], four_ranks: Outcome, writer: str, layout: Layout, ranks: int
) -> None:
    """Weights and moments come back to the bit, and the next step is the one that the layout which saved them takes."""
    wrote = {"1": one_rank, "2": two_ranks[0], "4": four_ranks}[writer]
    ours = run_ranks(ranks, train, corpus, layout, {}, saved / writer, None)[0]
    for kind, tensors in wrote.state.items():
        assert all(torch.equal(ours.loaded[kind][name], tensor) for name, tensor in tensors.items()), kind
    own = Layout() if writer == "1" else Layout(tensor=2)
    same(ours, run_ranks(int(writer), train, corpus, own, {}, saved / writer, None)[0])


def test_bf16_follows_one_rank(corpus: Path) -> None:
    changes = {"precision": "bf16"}
    one: Outcome = run_ranks(1, train, corpus, Layout(), changes, None, None)[0]
    two: Outcome = run_ranks(2, train, corpus, Layout(tensor=2), changes, None, None)[0]
    for a, b in zip(two.reports, one.reports, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=5e-2)


def load_an_older_one(place: Place, corpus: Path, checkpoint: Path) -> str:
    """What is said of a checkpoint whose optimizer state of out_proj is flat, as earlier versions kept it."""
    from minimax_train.engine.storage import read_tensors, write_tensors

    flat = "optimizer.exp_avg.blocks.0.attention.out_proj.weight"
    with session(place=place) as joined:
        from minimax_train.engine.state import optimizer_state, prepare_optimizer
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(little_plan(corpus, model=hybrid()), joined)
        prepare_optimizer(trainer.optimizer)
        state = optimizer_state(trainer.decoder, trainer.optimizer)
        numbers = state[f"{flat}/0"].data.numel()
        old = ShardedTensor(flat, torch.zeros(numbers), torch.float32, (numbers,), (numbers,), (0,), None)
        write_tensors({**state, f"{flat}/0": old}, checkpoint)
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
