"""The engine: bf16 follows fp32; a run goes on from a checkpoint to the bit; the loss weighs every token alike."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minimax_train.checkpoint.record import Progress, Record
from minimax_train.engine.session import session
from minimax_train.train.resume import Opening, restore
from minimax_train.train.rows import to_row
from parallel.testing import run_ranks
from parallel.world import Place
from tests.support import LittleRows, little_plan


def train(place: Place, corpus: Path, steps: int, changes: dict[str, Any], load: Path | None, store: Path | None) -> Any:
    """`steps` steps of 8 rows of 64 tokens; (losses, gradient norms, weights) seen by rank 0."""
    torch.set_num_threads(1)
    plan = little_plan(corpus, **changes)
    with session(place=place) as joined:
        from minimax_train.checkpoint.store import save
        from minimax_train.engine.state import model_state, optimizer_state, optimizer_steps
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(plan, joined, bucket_size=5000 if place.size > 1 else 3000)
        assert len(trainer.chunks[0].bucket_groups) > 3, "default buckets hold 40M numbers: faults of several padded ones would not show"
        done = 0
        if load is not None:
            from minimax_train.checkpoint.shelf import verified_record

            record = verified_record(load)
            restore(trainer, Opening(checkpoint=load, record=record, resumed=True, notes=[]), plan)
            done = record.progress.step
        source = LittleRows(plan.data.train)
        losses, norms = [], []
        for step in range(done, done + steps):
            rows = [to_row(source.row(step * 8 + i), joined) for i in range(place.rank, 8, place.size)]
            report = trainer.step(rows, 2e-3)
            losses.append(report.loss)
            norms.append(report.grad_norm)
        trainer.settle()
        decoder = trainer.decoder
        if store is not None:
            record = Record(
                model=plan.model,
                rope_base=1e4,
                max_positions=64,
                precision=plan.precision,
                progress=Progress(step=done + steps),
                optimizer_steps=optimizer_steps(trainer.optimizer),
            )
            state = model_state(decoder, joined.groups) | optimizer_state(decoder, trainer.optimizer, joined.groups)
            save(store, state, record, joined.groups)
        return losses, norms, {name: p.detach().float().clone() for name, p in decoder.named_parameters()}


@pytest.fixture(scope="module")
def one_rank(corpus: Path) -> Any:
    return run_ranks(1, train, corpus, 6, {}, None, None)[0]


def test_bf16_follows_fp32(corpus: Path, one_rank: Any) -> None:
    losses, _, _ = run_ranks(2, train, corpus, 6, {"precision": "bf16"}, None, None)[0]
    assert losses == pytest.approx(one_rank[0], rel=5e-3)
    assert losses != one_rank[0]


@pytest.mark.parametrize(
    ("precision", "saved", "loaded"), [("fp32", 2, 2), pytest.param("bf16", 2, 2, marks=pytest.mark.slow), ("bf16", 1, 2)]
)
def test_optimizer_state_goes_on_under_another_degree(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, saved: int, loaded: int
) -> None:
    """2 + 2 steps through a checkpoint equal 4 steps: to the bit where the ranks are as many, else to summation order."""
    changes = {"precision": precision}
    whole = run_ranks(saved, train, corpus, 4, changes, None, None)[0]
    run_ranks(saved, train, corpus, 2, changes, None, tmp_path / "half")
    losses, _, weights = run_ranks(loaded, train, corpus, 2, changes, tmp_path / "half", None)[0]
    if saved == loaded:
        assert losses == whole[0][2:]
        assert all(torch.equal(weights[name], weight) for name, weight in whole[2].items())
    else:
        assert losses == pytest.approx(whole[0][2:], rel=2e-4)


def gradient_of_uneven_rows(place: Place, corpus: Path) -> tuple[float, float]:
    """(the engine's gradient norm, plain autograd's) of a batch whose rows predict 60, 5 and 40 tokens."""
    torch.set_num_threads(1)
    plan = little_plan(corpus)
    with session(place=place) as joined:
        from minimax_train.engine.stage import bare, build_stage
        from minimax_train.engine.trainer import Trainer

        source = LittleRows(plan.data.train)
        rows = [to_row(source.row(i), joined) for i in range(3)]
        for i, predicted in enumerate((60, 5, 40)):
            labels = rows[i].labels
            assert labels is not None
            labels[predicted:] = -100
            rows[i] = rows[i].with_labels(labels)
        decoder = bare(build_stage(plan.model, joined, seed=plan.seed))
        total = torch.zeros(())
        everything = sum(int((row.labels >= 0).sum()) for row in rows if row.labels is not None)
        for row in rows:
            losses, routings = decoder(row)
            assert row.labels is not None
            weight = (row.labels >= 0).sum() / everything
            total = total + losses.sum() / everything + plan.auxiliary_loss * weight * sum(r.auxiliary_loss for r in routings)
        total.backward()
        plain = torch.stack([p.grad.square().sum() for p in decoder.parameters() if p.grad is not None]).sum().sqrt().item()
        return Trainer(plan, joined).step(rows, 1e-3).grad_norm, plain


def test_loss_is_the_mean_over_all_predicted_tokens(corpus: Path) -> None:
    """Not the mean of the rows' means; and the auxiliary loss of a row weighs as much as its tokens."""
    ours, plain = run_ranks(1, gradient_of_uneven_rows, corpus)[0]
    assert ours == pytest.approx(plain, rel=1e-5)


def weights_after_an_idle_step(place: Place, corpus: Path, checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights loaded without optimizer state, the same after a step at rate 0)."""
    from minimax_train.checkpoint.shelf import verified_record

    plan = little_plan(corpus, precision="bf16", seed=99)
    with session(place=place) as joined:
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(plan, joined)
        restore(trainer, Opening(checkpoint=checkpoint, record=verified_record(checkpoint), resumed=False, notes=[]), plan)
        before = {name: p.detach().clone() for name, p in trainer.decoder.named_parameters()}
        source = LittleRows(plan.data.train)
        trainer.step([to_row(source.row(place.rank), joined)], 0.0)
        trainer.settle()
        return before, {name: p.detach().clone() for name, p in trainer.decoder.named_parameters()}


def test_fresh_optimizer_starts_from_the_loaded_weights(corpus: Path, tmp_path: Path) -> None:
    """In bf16 the optimizer holds fp32 copies of its own: a step at rate 0 must leave the loaded weights, not bring back the drawn ones."""
    _, _, saved = run_ranks(1, train, corpus, 2, {"precision": "bf16"}, None, tmp_path / "ckpt")[0]
    before, after = run_ranks(2, weights_after_an_idle_step, corpus, tmp_path / "ckpt")[0]
    for name, weight in saved.items():
        assert torch.equal(before[name].float(), weight), name
        assert torch.equal(after[name], before[name]), name


def gathers(place: Place, corpus: Path) -> tuple[list[bool], bool, bool]:
    """While the first layer runs: is a gather of updated weights under way? What a settle changes after a step, and a second one."""
    torch.set_num_threads(1)
    plan = little_plan(corpus)
    with session(place=place) as joined:
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(plan, joined, bucket_size=5000)
        (chunk,) = trainer.chunks
        assert chunk.ddp_config.overlap_param_gather
        assert chunk.ddp_config.overlap_grad_reduce
        under_way: list[bool] = []

        def pending() -> bool:
            return any(group.param_gather_handle is not None for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups)

        def settles() -> bool:
            """Whether it changes a weight."""
            before = [p.detach().clone() for p in trainer.decoder.parameters()]
            trainer.settle()
            assert not pending()
            return any(not torch.equal(p, old) for p, old in zip(trainer.decoder.parameters(), before, strict=True))

        source = LittleRows(plan.data.train)
        rows = [to_row(source.row(place.rank), joined)]
        trainer.step(rows, 1e-3)
        hook = trainer.decoders[0].blocks["0"].register_forward_hook(lambda *_: under_way.append(pending()))
        trainer.step(rows, 1e-3)
        hook.remove()
        return under_way, settles(), settles()


def test_updated_weights_are_gathered_while_layers_run(corpus: Path) -> None:
    """Not at the end of the step: the next forward pass begins each bucket's gather a bucket ahead, and settle() what is left."""
    assert run_ranks(2, gathers, corpus) == [([True], True, False)] * 2
