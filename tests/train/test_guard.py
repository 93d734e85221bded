"""Steps that are not applied: which, that they change nothing, and that a run goes on, or stops, as it should."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimax_train.engine.session import Session
from minimax_train.engine.state import optimizer_state
from minimax_train.engine.trainer import Trainer
from minimax_train.plan import Checkpoints, Guard, Plan
from minimax_train.train.guard import Watch
from minimax_train.train.loop import train
from minimax_train.train.rows import to_row
from tests.support import LittleRows, little_plan

GUARD = Guard(sigmas=6.0, window=32, least=8)


def watched(norms: list[float], guard: Guard = GUARD, losses: list[float] | None = None) -> tuple[Watch, list[str | None]]:
    """What is remembered after these norms and losses (2 nats throughout), and the verdict on each."""
    watch, verdicts = Watch(), []
    for norm, loss in zip(norms, losses or [2.0] * len(norms), strict=True):
        verdicts.append(watch.judge(guard, loss, norm))
        watch = watch.after(guard, loss, norm, verdicts[-1])
    return watch, verdicts


def test_no_false_alarm() -> None:
    """Warm-up from 50 down to 1 with noise, a flat stretch, slow growth: 2,000 steps, none refused."""
    draw = random.Random(0)
    falling = [1 + 49 * math.exp(-step / 20) * draw.uniform(0.8, 1.2) for step in range(300)]
    flat = [1.0] * 200
    noisy = [draw.lognormvariate(0, 0.25) for _ in range(1000)]
    growing = [1.003**step * draw.uniform(0.9, 1.1) for step in range(500)]
    assert watched(falling + flat + noisy + growing)[1] == [None] * 2000


def test_spikes_and_what_is_no_number() -> None:
    usual = [1 + 0.1 * math.sin(step) for step in range(40)]
    watch, verdicts = watched([*usual, 30.0, 1.0, float("nan"), float("inf"), 1.0])
    assert [i for i, verdict in enumerate(verdicts) if verdict] == [40, 42, 43]
    assert "gradient norm 30; the last 32 were 1" in str(verdicts[40])
    assert (watch.refused, len(watch.norms), max(watch.norms)) == (0, 32, max(usual[-30:] + [1.0]))
    assert watched([1.0] * 7 + [1e6])[1][-1] is None, "before `least` steps nothing is an outlier"
    assert watched([float("nan")])[1] == ["gradient norm nan"]
    assert watched([*usual, 1e6], replace(GUARD, sigmas=None))[1][-1] is None
    assert watched([1.0] * 40 + [1.9])[1][-1] is None and watched([1.0] * 40 + [2.1])[1][-1] is not None


def test_losses_that_jump() -> None:
    """A spike is refused, also where the gradient is as ever; falling ones, noise, and another source that is harder by a third are not."""
    draw = random.Random(1)
    falling = [1.5 + 9 * math.exp(-step / 40) * draw.uniform(0.95, 1.05) for step in range(200)]
    noisy = [draw.uniform(1.4, 1.6) for _ in range(100)]
    harder = [draw.choice([1.5, 2.0]) for _ in range(100)]
    losses = falling + noisy + harder
    assert watched([1.0] * len(losses), losses=losses)[1] == [None] * len(losses)
    watch, verdicts = watched([1.0] * 103, losses=[*noisy, 4.0, float("nan"), 1.5])
    assert [i for i, verdict in enumerate(verdicts) if verdict] == [100, 101]
    assert "loss 4; the last 32 were 1." in str(verdicts[100]) and verdicts[101] == "loss nan"
    assert max(watch.losses) < 1.7 and len(watch.losses) == 32


@pytest.mark.parametrize(
    ("change", "says"), [({"least": 200}, "at most guard.window"), ({"sigmas": 0.5}, "guard.sigmas"), ({"window": 1}, "window")]
)
def test_impossible_guards(change: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Guard(**change)  # type: ignore[arg-type]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer.settle()
    tensors = {name: p.detach().clone() for name, p in trainer.decoder.named_parameters()}
    state = optimizer_state(trainer.decoder, trainer.optimizer, trainer.session.groups)
    return tensors | {key: sharded.data.clone() for key, sharded in state.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_refused_step_changes_nothing(corpus: Path, alone: Session, precision: str) -> None:
    """No weight, no moment, to the bit; and the steps after it are those of a run that never saw it."""
    plan = little_plan(corpus, precision=precision)
    rows = LittleRows(plan.data.train)
    batches = [[to_row(rows.row(4 * number + i), alone) for i in range(4)] for number in range(3)]
    one, other = Trainer(plan, alone), Trainer(plan, alone)
    for trainer in (one, other):
        assert trainer.step(batches[0], 1e-2).refusal is None
    before = state(one)
    report = one.step(batches[1], 1e-2, lambda _, norm: f"norm {norm:.3g}")
    assert report.refusal == f"norm {report.grad_norm:.3g}"
    assert all(torch.equal(before[key], tensor) for key, tensor in state(one).items())
    for trainer in (one, other):
        trainer.step(batches[2], 1e-2)
    after = state(other)
    assert all(torch.equal(after[key], tensor) for key, tensor in state(one).items())
    assert not all(torch.equal(before[key], tensor) for key, tensor in after.items())


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float) -> list[int]:
    """Multiplies the gradients of these calls of `descend`; returns a list that counts the calls."""
    calls: list[int] = []
    descend = Trainer.descend

    def spoiled(self: Trainer, rows: list[object]) -> object:
        totals = descend(self, rows)  # type: ignore[arg-type]
        calls.append(len(calls))
        if calls[-1] in steps:
            for parameter in self.decoder.parameters():
                parameter.main_grad.mul_(factor)  # type: ignore[attr-defined]
        return totals

    monkeypatch.setattr(Trainer, "descend", spoiled)
    return calls


def lines(run: Path) -> list[dict[str, object]]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def guarded(corpus: Path, **changes: object) -> Plan:
    guard = Guard(window=4, least=3, most=2, rewinds=0)
    return little_plan(corpus, **{"guard": guard, "checkpoints": Checkpoints(every_steps=1, keep=20), **changes})


@pytest.mark.parametrize("factor", [float("nan"), 1e4])
def test_a_run_goes_on_over_a_bad_batch(
    corpus: Path, alone: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """The step is logged with the place of its rows and counted; and a run stopped right before it and resumed says the same to the bit."""
    plan = guarded(corpus)
    spoil(monkeypatch, {4}, factor)
    train(plan, tmp_path / "whole", alone)
    monkeypatch.undo()
    whole = lines(tmp_path / "whole")
    assert len(whole) == plan.total_steps
    refused = [line for line in whole if "refused" in line]
    assert [line["step"] for line in refused] == [5]
    assert "gradient norm" in str(refused[0]["refused"]) and "begin" in str(refused[0]["refused"])
    train(replace(plan, steps=4), tmp_path / "parts", alone)
    spoil(monkeypatch, {0}, factor)
    train(plan, tmp_path / "parts", alone)
    assert [line["loss"] for line in lines(tmp_path / "parts")] == [line["loss"] for line in whole]
    assert [line["step"] for line in lines(tmp_path / "parts") if "refused" in line] == [5]


def test_a_run_stops_where_it_cannot_go_on(corpus: Path, alone: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """guard.most refused steps in a row are borne, one more is not, also when the run was stopped and resumed in between."""
    spoil(monkeypatch, {1, 2, 3}, float("nan"))
    with pytest.raises(FloatingPointError, match="step 4: 3 steps in a row .* guard.rewinds allows 0"):
        train(guarded(corpus), tmp_path / "run", alone)
    monkeypatch.undo()
    train(guarded(corpus, steps=1), tmp_path / "parts", alone)
    spoil(monkeypatch, {0, 1}, float("nan"))
    train(guarded(corpus, steps=3), tmp_path / "parts", alone)
    monkeypatch.undo()
    spoil(monkeypatch, {0}, float("nan"))
    with pytest.raises(FloatingPointError, match="step 4"):
        train(guarded(corpus), tmp_path / "parts", alone)


def test_an_outlier_is_applied_where_only_numbers_are_asked_for(
    corpus: Path, alone: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {4}, 1e4)
    train(little_plan(corpus, guard=Guard(sigmas=None)), tmp_path / "run", alone)
    assert not [line for line in lines(tmp_path / "run") if "refused" in line]
