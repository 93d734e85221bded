"""Going back over bad batches: to which state, without which rows, how often, and that a kill on the way changes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minimax_train.checkpoint.shelf import checkpoints_in
from minimax_train.engine.session import Session, session
from minimax_train.engine.trainer import Trainer
from minimax_train.model.row import Row
from minimax_train.plan import Checkpoints, Guard, Plan
from minimax_train.report.page import write_report
from minimax_train.train.loop import train
from minimax_train.train.rows import to_row
from minimax_train.train.schedule import learning_rate
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.support import LittleRows, little_plan

GUARD = Guard(window=4, least=4, most=1, rewinds=2)
ROWS = 4  # of a batch in the first stage


def watchful(corpus: Path, every_steps: int = 2, **changes: object) -> Plan:
    return little_plan(corpus, **{"guard": GUARD, "checkpoints": Checkpoints(every_steps=every_steps, keep=20), **changes})


def batch(plan: Plan, number: int, place: Session) -> list[Row]:
    """The rows of the first stage's batch `number`, as the run would read them with nothing left out."""
    rows = LittleRows(plan.data.train, seed=plan.seed)
    return [to_row(rows.row(ROWS * number + i), place) for i in range(ROWS)]


def spoil_rows(patch: pytest.MonkeyPatch, plan: Plan, batches: range) -> None:
    """Whatever the weights: a rank whose rows are of these batches of the first stage gets no number for a gradient."""
    source = LittleRows(plan.data.train, seed=plan.seed)
    bad = {source.row(number).tokens.tobytes() for number in range(ROWS * batches.start, ROWS * batches.stop)}
    descend = Trainer.descend

    def spoiled(self: Trainer, rows: list[Row]) -> object:
        totals = descend(self, rows)
        if any(row.tokens.numpy().tobytes() in bad for row in rows):
            for parameter in self.decoder.parameters():
                parameter.main_grad.fill_(float("nan"))  # type: ignore[attr-defined]
        return totals

    patch.setattr(Trainer, "descend", spoiled)


def lines(run: Path) -> list[dict[str, object]]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def losses(run: Path) -> list[object]:
    return [line["loss"] for line in lines(run)]


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_it_goes_back_and_leaves_the_rows_out(
    corpus: Path, alone: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Batches 3 and 4 are bad, the checkpoint before them is of step 2: what follows is, to the bit, what a run that reads batches
    0, 1, 5, 6, 7, 8 computes, though batch 2 was trained on in between. And the same again where a kill left the checkpoint alone."""
    plan, run = watchful(corpus, precision=precision), tmp_path / "run"
    truth = Trainer(plan, alone)
    for decoder in truth.decoders:
        decoder.rope_base = plan.stages[0].rope_base
    expected = [
        truth.step(batch(plan, number, alone), learning_rate(plan.stages[0], step)).loss for step, number in enumerate((0, 1, 5, 6, 7, 8))
    ]
    spoil_rows(monkeypatch, plan, range(3, 5))
    train(plan, run, alone)
    assert losses(run)[:6] == expected
    (line,) = (line for line in lines(run) if "rewound" in line)
    rewound = line["rewound"]
    assert isinstance(rewound, dict)
    assert (line["step"], rewound["from_step"], rewound["to_step"]) == (3, 5, 2)
    assert [rewound["left_out"]["train"][end]["rows"] for end in ("from", "to")] == [2 * ROWS, 5 * ROWS]
    (kept,) = (run / "logs").glob("rewound-1-to-step-00000002.jsonl")
    gone = [json.loads(text) for text in kept.read_text().splitlines()]
    assert [line["step"] for line in gone if "refused" in line] == [4, 5]
    whole = losses(run)
    for checkpoint in checkpoints_in(run / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    train(plan, run, alone)
    assert losses(run) == whole
    page = write_report(run).read_text()
    assert "went back from step 5 to step 2" in page


def test_it_goes_on_from_a_checkpoint_behind_it(corpus: Path, alone: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after it went back, and resumed: the rows left out stay so."""
    plan = watchful(corpus)
    spoil_rows(monkeypatch, plan, range(3, 5))
    train(plan, tmp_path / "whole", alone)
    train(watchful(corpus, steps=4), tmp_path / "parts", alone)
    train(plan, tmp_path / "parts", alone)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_checkpoint_among_refused_steps_is_put_aside(
    corpus: Path, alone: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = watchful(corpus, every_steps=1)
    spoil_rows(monkeypatch, plan, range(3, 5))
    train(plan, tmp_path / "run", alone)
    aside = [path.name[: len("rewound-step-00000004")] for path in (tmp_path / "run" / "checkpoints").glob("rewound-*")]
    assert aside == ["rewound-step-00000004"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").exists()


def test_it_stops_in_the_end(corpus: Path, alone: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = watchful(corpus)
    spoil_rows(monkeypatch, plan, range(3, 100))
    with pytest.raises(FloatingPointError, match="allows 2 returns to a checkpoint in a stage, and it made 2"):
        train(plan, tmp_path / "run", alone)
    with pytest.raises(FloatingPointError, match="allows 2 returns to a checkpoint in a stage, and it made 2"):
        train(plan, tmp_path / "run", alone)
    monkeypatch.undo()
    spoil_rows(monkeypatch, plan, range(0, 100))
    with pytest.raises(FloatingPointError, match="no intact checkpoint before them"):
        train(plan, tmp_path / "other", alone)


def _train_spoiled(place: Place, plan: Plan, run: Path) -> list[object]:
    with session("cpu", Layout(), place) as opened, pytest.MonkeyPatch.context() as patch:
        spoil_rows(patch, plan, range(3, 5))
        train(plan, run, opened)
    return losses(run)


def test_ranks_go_back_together(corpus: Path, alone: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = watchful(corpus)
    two = run_ranks(2, _train_spoiled, plan, tmp_path / "two")
    spoil_rows(monkeypatch, plan, range(3, 5))
    train(plan, tmp_path / "one", alone)
    assert two[0] == two[1] == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    assert torch.tensor(two[0]).isfinite().all()
