"""Changing a run that is under way: what may change, that it counts from the next step on, is noted, and stays."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.sampler import Bookmark
from minimax_train.checkpoint.record import Progress
from minimax_train.cli import main
from minimax_train.engine.session import Session
from minimax_train.plan import Batch, CriticalBatch, Mixture, Plan
from minimax_train.recipe import as_yaml, differences
from minimax_train.report.page import write_report
from minimax_train.train import override
from minimax_train.train.loop import train
from minimax_train.train.schedule import learning_rate
from tests.support import little_plan


def lines(run: Path) -> list[dict[str, float]]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def test_a_run_goes_on_otherwise(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through the command line: refused without the word for it, applied and noted with it, and kept by the next plain call."""
    recipe, run = tmp_path / "little.yaml", tmp_path / "run"
    recipe.write_text(as_yaml(little_plan(corpus)))
    peak = "stages.0.learning_rate.peak=0.001"
    assert main(["train", str(recipe), "--to", str(run), "--override", peak]) == 2
    assert "is none yet: use --set" in capfd.readouterr().err and not run.exists()
    assert main(["train", str(recipe), "--to", str(run), "--set", "steps=4"]) == 0
    assert main(["train", str(recipe), "--to", str(run), "--set", "steps=5", "--set", peak]) == 2
    error = capfd.readouterr().err
    assert "stages.0.learning_rate.peak: 0.003 -> 0.001" in error and "--override a.b=c" in error
    assert (
        main(["train", str(recipe), "--to", str(run), "--set", "steps=5", "--override", peak, "--override", "stages.1.rope_base=2e5"]) == 0
    )
    assert "override after step 4: stages.0.learning_rate.peak: 0.003 -> 0.001" in capfd.readouterr().err
    assert main(["train", str(recipe), "--to", str(run)]) == 0
    assert [line["lr"] for line in lines(run)][2:6] == pytest.approx([3e-3, 3e-3, 1e-3, 1e-3])
    assert [line["rope_base"] for line in lines(run)] == [1e4] * 6 + [2e5] * 3
    noted = [json.loads(line) for line in (run / "overrides.jsonl").read_text().splitlines()]
    assert [(line["setting"], line["step"]) for line in noted] == [(peak, 4), ("stages.1.rope_base=2e5", 4)]
    assert len(noted[0]["changes"]) == 2
    assert "After step 4: stages.0.learning_rate.peak: 0.003 -&gt; 0.001" in write_report(run).read_text()
    assert main(["train", str(recipe), "--to", str(run), "--override", "seed=3"]) == 2
    assert "seed cannot change while a run goes on" in capfd.readouterr().err


def test_a_kill_between_the_note_and_the_plan(corpus: Path, tmp_path: Path) -> None:
    recipe, run = tmp_path / "little.yaml", tmp_path / "run"
    recipe.write_text(as_yaml(little_plan(corpus)))
    assert main(["train", str(recipe), "--to", str(run), "--set", "steps=1"]) == 0
    before = (run / "plan.yaml").read_text()
    arguments = ["train", str(recipe), "--to", str(run), "--set", "steps=1", "--override", "auxiliary_loss=0.02"]
    assert main(arguments) == 0
    noted = (run / "overrides.jsonl").read_text()
    (run / "plan.yaml").write_text(before)
    assert main(arguments[:-2]) == 0
    assert "auxiliary_loss: 0.02" in (run / "plan.yaml").read_text() and (run / "overrides.jsonl").read_text() == noted


STANDS = Progress(step=4, stage_step=4, tokens=4 * 256)
LATER = Progress(step=7, stage=1, stage_step=1, tokens=6 * 256 + 512)


def changed(plan: Plan, stage: int, **changes: object) -> Plan:
    stages = list(plan.stages)
    stages[stage] = replace(stages[stage], **changes)  # type: ignore[arg-type]
    return replace(plan, stages=tuple(stages))


@pytest.mark.parametrize(
    ("stage", "changes", "progress", "says"),
    [
        (0, {"rope_base": 2e4}, LATER, "stage '64', which is finished"),
        (0, {"rope_base": 2e4}, STANDS, "only tokens, .* can change in it"),
        (0, {"length": 128}, STANDS, "only tokens"),
        (0, {"name": "other"}, STANDS, "must keep their names"),
        (0, {"batch_tokens": 512}, STANDS, "would have made other batches"),
        (0, {"batch_ramp": (Batch(from_tokens=512, batch_tokens=512),)}, STANDS, "let it begin later"),
        (0, {"tokens": 512}, STANDS, "would have made other batches"),
        (0, {"mixture": Mixture(weights={"train": 1}, late={"train": 1})}, STANDS, "only tokens"),
    ],
)
def test_what_may_not_change(corpus: Path, stage: int, changes: dict[str, object], progress: Progress, says: str) -> None:
    old = little_plan(corpus)
    new = changed(old, stage, **changes)
    with pytest.raises(ValueError, match=says):
        override.check(old, new, differences({"stages": []}, {"stages": [1]}), progress)


def test_what_may_change(corpus: Path) -> None:
    """Of the stage under way what comes later, of a later stage everything; the plan's schedule behind the step is as it was."""
    old = little_plan(corpus)
    longer = changed(old, 0, tokens=12 * 256, batch_ramp=(Batch(from_tokens=4 * 256, batch_tokens=512),))
    override.check(old, longer, ["stages.0.tokens: 1536 -> 3072"], STANDS)
    assert [longer.stages[0].batch_at(step) for step in (3, 4)] == [256, 512]
    override.check(old, changed(old, 1, length=128, batch_tokens=256, rope_base=3e5), [], STANDS)
    override.check(old, replace(old, stages=(*old.stages, replace(old.stages[1], name="more"))), ["stages: 2 -> 3"], LATER)
    over = Progress(step=9, stage=2, tokens=6 * 256 + 3 * 512)
    override.check(old, replace(old, stages=(*old.stages, replace(old.stages[1], name="more"))), ["stages: 2 -> 3"], over)
    assert learning_rate(longer.stages[0], 3) == learning_rate(old.stages[0], 3)


def test_late_mixture_stays_where_it_began(corpus: Path) -> None:
    late = Mixture(weights={"train": 1}, late={"train": 1}, late_fraction=0.5)
    old = changed(little_plan(corpus), 0, mixture=late)
    with pytest.raises(ValueError, match="mixture.late would have begun"):
        override.check(old, changed(old, 0, tokens=5 * 256), [], replace(STANDS, sources={"train": Bookmark(turns=16)}))


def test_the_critical_batch_is_told(corpus: Path, tmp_path: Path, alone: Session, capfd: pytest.CaptureFixture[str]) -> None:
    """At the loss of 5.77 that an untrained model has, a power of 0 asks for what it asks for at 1: twice the batch of 256 tokens."""
    train(little_plan(corpus, critical_batch=CriticalBatch(tokens_at_one=512, power=0), steps=2), tmp_path / "run", alone)
    assert "the critical batch is 512 tokens, twice the 256 of a step" in capfd.readouterr().err
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["critical_batch_tokens"] == 512
