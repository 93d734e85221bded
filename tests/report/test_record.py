"""Reading a run: what is refused, what is kept, what is remarked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimax_train.report.positions import coarser
from minimax_train.report.record import read_record
from minimax_train.report.summary import notices, summarize

MakeRun = Callable[..., Path]


def _edit(run: Path, number: int, text: str) -> None:
    """Replaces line `number` (from 1) of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[number - 1] = text
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_stages_cover_the_run(make_run: MakeRun, synthetic: Any) -> None:
    record = read_record(make_run())
    ends = np.cumsum([batch * steps for _, _, _, batch, steps, _ in synthetic.STAGES])
    assert [record.span(i) for i in range(3)] == [(0, ends[0]), (ends[0], ends[1]), (ends[1], ends[2])]
    assert [row.steps for row in summarize(record).stages] == [120, 40, 10]


def test_a_run_begun_from_a_checkpoint_counts_its_own_tokens(make_run: MakeRun, synthetic: Any) -> None:
    lines = [line | {"tokens": line["tokens"] + 7_000_000, "step": line["step"] + 500} for line in synthetic.metrics()]
    summary = summarize(read_record(make_run(lines=lines)))
    assert summary.tokens == 1_146_880


def test_validation_before_a_stage_is_not_its_result(make_run: MakeRun, synthetic: Any) -> None:
    begun = [line | {"stage": "8K"} if "validation_loss" in line else line for line in synthetic.metrics() if line["step"] <= 122]
    rows = summarize(read_record(make_run(lines=begun))).stages
    assert [row.validation_loss for row in rows] == [None, None, None]


@pytest.mark.parametrize("number", [1, 5, 177])
def test_broken_line_is_refused_with_its_number(make_run: MakeRun, number: int) -> None:
    run = make_run()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 177
    _edit(run, number, '{"step": 4, "sta')  # the last one too: it ends in a newline, so no kill cut it short
    with pytest.raises(ValueError, match=rf"metrics.jsonl line {number} is not JSON"):
        read_record(run)


def test_unfinished_last_line_is_ignored(make_run: MakeRun) -> None:
    run = make_run()
    whole = read_record(run)
    with (run / "metrics.jsonl").open("ab") as metrics:
        metrics.write('{"step": 171, "stage": "ü'.encode()[:-1])
    cut = read_record(run)
    assert np.array_equal(cut.training.step, whole.training.step)
    assert len(cut.remarks) == 1
    assert "line 178" in cut.remarks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "3.1"}, "line 3: 'loss' is '3.1'"),
        ({"loss": True}, "line 3: 'loss' is True"),
        ({"lr": None}, "line 3: 'lr' is None"),
        ({"mfu": "half"}, "line 3: 'mfu' is 'half'"),
        ({"tokens": float("nan")}, "line 3: 'tokens' is nan"),
        ({"step": -1}, "line 3: 'step' is -1"),
        ({"stage": "64K"}, "line 3: stage '64K' is not in plan.yaml, which has '2K', '8K', '32K'"),
        ({"stage": ["2K"]}, "line 3: stage"),
    ],
)
def test_bad_values_are_refused(make_run: MakeRun, synthetic: Any, change: dict[str, Any], message: str) -> None:
    run = make_run()
    _edit(run, 3, json.dumps(synthetic.metrics()[2] | change))
    with pytest.raises(ValueError) as refusal:
        read_record(run)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def _positions(change: dict[str, Any]) -> Callable[[Path], Any]:
    def write(run: Path) -> None:
        path = run / "evaluation" / "positions.json"
        value = json.loads(path.read_text())
        value["stages"][1] |= change
        path.write_text(json.dumps(value))

    return write


def _needles(change: dict[str, Any]) -> Callable[[Path], Any]:
    def write(run: Path) -> None:
        path = run / "evaluation" / "needle.json"
        value = json.loads(path.read_text())
        value["cells"][3] |= change
        path.write_text(json.dumps(value))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "plan.yaml").unlink(), "has no plan.yaml"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl"),
        (lambda run: (run / "plan.yaml").write_text("stages: [{name: 2K}]"), "plan.yaml is no resolved plan (KeyError: 'length')"),
        (lambda run: (run / "plan.yaml").write_text("a: [1"), "plan.yaml is no resolved plan"),
        (lambda run: (run / "plan.yaml").write_text("stages: []"), "plan.yaml has no stages"),
        (lambda run: (run / "run.json").write_text("{"), "run.json is not JSON"),
        (lambda run: (run / "run.json").write_text("[]"), "run.json holds list"),
        (lambda run: (run / "evaluation" / "positions.json").write_text("[]"), "positions.json has no list 'stages'"),
        (_positions({"inside": {}}), "positions.json stages[1]: missing key 'before'"),
        (_positions({"edges": [0, 2, 1]}), "positions.json stages[1]: 'edges' must be at least two rising positions"),
        (_positions({"after": [1.0, 2.0]}), "positions.json stages[1]: 'after' has shape (2,), but 129 edges make 128 bins"),
        (lambda run: (run / "evaluation" / "needle.json").write_text("[]"), "needle.json: list indices must be integers"),
        (_needles({"accuracy": 1.5}), "needle.json: 'accuracy' is 1.5; it must be from 0 to 1: write it again"),
        (_needles({"loss": "x"}), "needle.json: could not convert string to float: 'x'"),
    ],
)
def test_damaged_files_are_refused(make_run: MakeRun, damage: Callable[[Path], Any], message: str) -> None:
    run = make_run()
    damage(run)
    with pytest.raises(ValueError) as refusal:
        read_record(run)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_ragged_expert_load_is_refused(make_run: MakeRun, synthetic: Any) -> None:
    run = make_run()
    _edit(run, 1, json.dumps(synthetic.metrics()[0] | {"expert_load": [[0.5, 0.5], [1.0]]}))
    with pytest.raises(ValueError, match="line 1: 'expert_load' must be one list of shares per layer"):
        read_record(run)


def test_bad_entropy_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    (run / "run.json").write_text('{"unigram_entropy": "5.9"}')
    with pytest.raises(ValueError, match="'unigram_entropy' is '5.9'"):
        summarize(read_record(run))


def test_a_resume_overtakes_what_followed_its_checkpoint(make_run: MakeRun, synthetic: Any) -> None:
    lines = [line for line in synthetic.metrics() if line["step"] <= 70]  # validation at steps 0 and 60
    again = [line | {"loss": 9.0} for line in lines if 50 < line["step"] <= 55]
    record = read_record(make_run(lines=lines + again))
    assert record.training.step.tolist() == list(range(1, 56))
    assert record.training.loss[50:].tolist() == [9.0] * 5
    assert record.validation.step.tolist() == [0]
    assert "The run was resumed: 21 lines" in record.remarks[0]


def test_validation_written_before_or_after_its_step_is_kept(make_run: MakeRun, synthetic: Any) -> None:
    lines = synthetic.metrics()
    swapped = sorted(lines, key=lambda line: (line["step"], "loss" in line))
    record = read_record(make_run(lines=swapped))
    assert record.validation.step.size == 7
    assert record.training.step.size == 170
    assert record.remarks == ()


def test_other_lines_are_counted(make_run: MakeRun, synthetic: Any) -> None:
    record = read_record(make_run(lines=[*synthetic.metrics(), {"step": 170, "stage": "32K", "event": "saved"}]))
    assert record.remarks == ("1 lines of metrics.jsonl are neither training nor validation lines; they are not shown.",)


def test_notices_name_non_finite_steps_and_unfinished_stages(make_run: MakeRun, synthetic: Any) -> None:
    lines = [line for line in synthetic.metrics() if line["step"] <= 130]
    for line in lines:
        if "loss" in line and line["step"] in (12, 40):
            line["loss"], line["grad_norm"] = float("nan"), float("inf")
        if line["step"] == 120 and "validation_loss" in line:
            line["validation_loss"] = float("inf")
    record = read_record(make_run(lines=lines))
    said = " ".join(notices(record, summarize(record)))
    assert "training loss is not finite at 2 step(s), first at step 12" in said
    assert "validation loss is not finite at 1 step(s), first at step 120" in said
    assert "gradient norm is not finite at 2 step(s), first at step 12" in said
    assert "Stage 8K saw 81,920 of 327,680 planned tokens." in said
    assert "Stage 32K has not begun." in said
    assert "Stage 2K saw" not in said


def test_an_extension_without_evaluation_is_named(make_run: MakeRun) -> None:
    run = make_run()
    path = run / "evaluation" / "positions.json"
    path.write_text(json.dumps({"stages": json.loads(path.read_text())["stages"][:1]}))
    record = read_record(run)
    assert any("not evaluated for 32K:" in notice for notice in notices(record, summarize(record)))


def test_merged_bins_keep_every_token_and_the_previous_length(make_run: MakeRun) -> None:
    run = make_run()
    _positions({"count": [3 * (i % 5) for i in range(128)], "before": [float(i) for i in range(128)]})(run)
    positions = read_record(run).positions
    assert positions is not None
    for stage in positions:
        assert np.isnan(stage.before[stage.count == 0]).all()
        merged = coarser(stage)
        assert merged.count.size < stage.count.size
        assert merged.count.sum() == stage.count.sum()
        assert stage.previous_length in merged.edges
        assert (merged.edges[[0, -1]] == stage.edges[[0, -1]]).all()
        assert np.nansum(merged.before * merged.count) == pytest.approx(np.nansum(stage.before * stage.count), rel=1e-12)
        assert (np.isnan(merged.before) == (merged.count == 0)).all()
