"""The figures in the report's tables, and what has to be said beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimax_train.report.record import Record


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One stage as trained so far; None where nothing was measured."""

    name: str
    length: int
    rope_base: float
    planned_tokens: int
    tokens: int
    steps: int
    validation_loss: float | None  # nats per token, last validation of the stage
    seconds: float  # in optimizer steps
    tokens_per_second: float | None  # tokens of its steps over their seconds
    mfu: float | None  # weighted by seconds; steps without one left out


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures over the whole run; losses and margin in nats per token, None where not measured."""

    validation_loss: float | None
    validation_step: int | None
    unigram_entropy: float | None
    margin: float | None  # unigram entropy - final validation loss
    tokens: int
    planned_tokens: int
    steps: int
    seconds: float
    stages: tuple[StageRow, ...]


def summarize(record: Record) -> Summary:
    """The tables' figures of `record`. Raises ValueError when run.json's unigram_entropy is no number."""
    rows = tuple(_stage_row(record, number) for number in range(len(record.stages)))
    validation = record.validation
    loss = float(validation.loss[-1]) if validation.loss.size else None
    entropy = _entropy(record.facts or {})
    return Summary(
        validation_loss=loss,
        validation_step=int(validation.step[-1]) if validation.step.size else None,
        unigram_entropy=entropy,
        margin=None if loss is None or entropy is None else entropy - loss,
        tokens=sum(row.tokens for row in rows),
        planned_tokens=sum(row.planned_tokens for row in rows),
        steps=sum(row.steps for row in rows),
        seconds=sum(row.seconds for row in rows),
        stages=rows,
    )


def _stage_row(record: Record, number: int) -> StageRow:
    stage, training = record.stages[number], record.training
    mine = training.stage == number
    seconds = training.step_seconds[mine]
    timed = np.isfinite(seconds) & np.isfinite(training.tokens_per_second[mine]) & (seconds > 0)
    begin, end = record.span(number) or (0.0, 0.0)
    losses = record.validation.loss[(record.validation.stage == number) & (record.validation.tokens > begin)]
    return StageRow(
        name=stage.name,
        length=stage.length,
        rope_base=stage.rope_base,
        planned_tokens=stage.tokens,
        tokens=int(end - begin),
        steps=int(mine.sum()),
        validation_loss=float(losses[-1]) if losses.size else None,
        seconds=float(seconds[timed].sum()),
        tokens_per_second=_weighted(training.tokens_per_second[mine], seconds, timed),
        mfu=_weighted(training.mfu[mine], seconds, timed & np.isfinite(training.mfu[mine])),
    )


def _weighted(values: np.ndarray, weights: np.ndarray, use: np.ndarray) -> float | None:
    return float(np.average(values[use], weights=weights[use])) if use.any() else None


def _entropy(facts: Mapping[str, Any]) -> float | None:
    entropy = facts.get("unigram_entropy")
    if entropy is not None and (isinstance(entropy, bool) or not isinstance(entropy, int | float)):
        raise ValueError(f"run.json: 'unigram_entropy' is {entropy!r}: it must be a number (nats per token) or null")
    return None if entropy is None else float(entropy)


def notices(record: Record, summary: Summary) -> tuple[str, ...]:
    """What was not measured, is unfinished or is not finite: one sentence each."""
    return (*_measuring(record, summary), *_progress(record, summary), *_non_finite(record), *record.remarks)


def _measuring(record: Record, summary: Summary) -> list[str]:
    said = []
    if record.facts is None:
        said.append("run.json is missing: the device, the versions and the unigram entropy of this run are not known.")
    elif "cpu" in (str(record.facts.get("device", "")).lower().split(":")[0], str(record.facts.get("backend", "")).lower()):
        said.append("CPU run: it proves the arithmetic, not GPU speed; the throughput here says nothing about one.")
    if record.facts is not None and summary.unigram_entropy is None:
        said.append("run.json has no unigram_entropy: there is no margin to show.")
    if summary.validation_loss is None:
        said.append("No validation line yet: validation loss and expert load by layer are not measured.")
    if record.training.step.size and not np.isfinite(record.training.mfu).any():
        said.append("MFU (the share of the device's peak) was not measured.")
    if record.positions is not None:
        evaluated = {stage.stage for stage in record.positions}
        pairs = zip(record.stages, record.stages[1:], strict=False)
        lacking = [later.name for earlier, later in pairs if later.length > earlier.length and later.name not in evaluated]
        if lacking:
            names = ", ".join(lacking)
            said.append(f"Loss by position is not evaluated for {names}: run `minimax-train evaluate positions RUN`.")
    return said


def _progress(record: Record, summary: Summary) -> list[str]:
    said = []
    for row in summary.stages:
        if not row.steps:
            said.append(f"Stage {row.name} has not begun.")
        elif row.planned_tokens - row.tokens > row.tokens / row.steps:  # less than a step short is rounding to whole steps
            said.append(f"Stage {row.name} saw {row.tokens:,} of {row.planned_tokens:,} planned tokens.")
    return said


def _non_finite(record: Record) -> list[str]:
    said = []
    for name, where in (("training loss", record.training), ("validation loss", record.validation)):
        steps = where.step[~np.isfinite(where.loss)]
        if steps.size:
            said.append(f"The {name} is not finite at {steps.size} step(s), first at step {steps[0]}: marked × in the loss plot.")
    steps = record.training.step[~np.isfinite(record.training.grad_norm)]
    if steps.size:
        said.append(f"The gradient norm is not finite at {steps.size} step(s), first at step {steps[0]}: marked × in its plot.")
    return said
