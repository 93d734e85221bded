"""A run directory as the report sees it: read once, checked, never written."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from minimax_train.report.gradients import Gradients, collect_gradients, read_gradients
from minimax_train.report.needles import NeedleMaps, read_needles
from minimax_train.report.parts import Parts, collect_parts, read_parts
from minimax_train.report.positions import PositionLosses, read_positions
from minimax_train.report.routers import Routers, collect_routers, read_router
from minimax_train.report.sources import Sources, collect_sources, read_sources

_REQUIRED = ("tokens", "loss", "grad_norm", "lr", "tokens_per_second", "step_seconds")
_OPTIONAL = ("mfu", "expert_load_max")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the plan; `tokens` is what the plan wants of this stage alone."""

    name: str
    length: int
    rope_base: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training lines in step order: arrays `[N]`, float64 unless said. NaN in `mfu` and `expert_load_max` means not recorded."""

    step: np.ndarray  # int64
    stage: np.ndarray  # int64: index into Record.stages
    tokens: np.ndarray  # total over the run, after the step
    loss: np.ndarray  # nats per token
    grad_norm: np.ndarray
    lr: np.ndarray
    tokens_per_second: np.ndarray
    step_seconds: np.ndarray
    mfu: np.ndarray  # fraction of the device's peak
    expert_load_max: np.ndarray  # largest expert share times number of experts


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation lines in step order: arrays `[M]`; `expert_load` `[layers, experts]` (shares) comes from the last line that has one."""

    step: np.ndarray  # int64
    stage: np.ndarray  # int64: index into Record.stages
    tokens: np.ndarray
    loss: np.ndarray  # nats per token
    expert_load: np.ndarray | None
    expert_load_step: int | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """All a report needs; what may be None is where the run has nothing of it."""

    name: str
    directory: str
    plan_text: str
    stages: tuple[Stage, ...]
    training: Training
    validation: Validation
    routers: Routers | None
    sources: Sources | None
    gradients: Gradients | None
    parts: Parts | None
    positions: tuple[PositionLosses, ...] | None
    needles: NeedleMaps | None
    facts: Mapping[str, Any] | None
    remarks: tuple[str, ...]  # said on the page

    @property
    def first_token(self) -> float:
        """Tokens already seen when training began: of the validation line before the first step, else 0."""
        before = self.validation.step < (self.training.step[0] if self.training.step.size else math.inf)
        return float(self.validation.tokens[before][-1]) if before.any() else 0.0

    def span(self, stage: int) -> tuple[float, float] | None:
        """(tokens before, tokens after) of stage number `stage` as trained so far; None when it has no step yet."""
        of_stage = np.flatnonzero(self.training.stage == stage)
        if not of_stage.size:
            return None
        begin = self.training.tokens[of_stage[0] - 1] if of_stage[0] else self.first_token
        return float(begin), float(self.training.tokens[of_stage[-1]])


def read_record(run: Path) -> Record:
    """Reads `run`: plan.yaml and metrics.jsonl (required), evaluation/{positions,needle}.json and run.json (optional).

    Raises ValueError, one line, for a missing required file or a broken one (metrics.jsonl: with the line number).
    """
    for name in ("plan.yaml", "metrics.jsonl"):
        if not (run / name).is_file():
            raise ValueError(f"{run} has no {name}: give the directory of a run that `minimax-train train` wrote")
    plan_text = (run / "plan.yaml").read_text(encoding="utf-8")
    name, stages = _read_plan(plan_text, run / "plan.yaml")
    lines, remarks = _read_lines(run / "metrics.jsonl", {stage.name: i for i, stage in enumerate(stages)})
    remarks += _overrides(run / "overrides.jsonl")
    facts = read_json(run / "run.json")
    if facts is not None and not isinstance(facts, dict):
        raise ValueError(f"{run / 'run.json'} holds {type(facts).__name__}: it must be one object of facts")
    return Record(
        name=name or run.resolve().name,
        directory=run.resolve().name,
        plan_text=plan_text,
        stages=stages,
        training=_training(line for line in lines if "loss" in line),
        validation=_validation([line for line in lines if "validation_loss" in line]),
        routers=collect_routers([line.get("router") for line in lines if "loss" in line]),
        sources=collect_sources([line.get("sources") for line in lines if "loss" in line]),
        gradients=collect_gradients([line.get("gradients") for line in lines if "loss" in line]),
        parts=collect_parts([line.get("parts") for line in lines if "loss" in line]),
        positions=read_positions(read_json(run / "evaluation" / "positions.json"), run / "evaluation" / "positions.json"),
        needles=read_needles(read_json(run / "evaluation" / "needle.json"), run / "evaluation" / "needle.json"),
        facts=facts,
        remarks=remarks,
    )


def read_json(path: Path) -> Any:
    """The JSON value in `path`, None when there is no such file. Raises ValueError naming the file when it is not JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): write it again, or delete it to report without it") from error


def _overrides(path: Path) -> tuple[str, ...]:
    """What was changed while the run was under way, each once."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        said = [f"After step {int(line['step']):,}: {change}, by --override." for line in lines for change in line["changes"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of overrides ({error}): `train --override` writes it") from error
    return tuple(dict.fromkeys(said))


def _read_plan(text: str, path: Path) -> tuple[str, tuple[Stage, ...]]:
    try:
        plan = YAML(typ="safe", pure=True).load(text)
        stages = tuple(
            Stage(name=str(s["name"]), length=int(s["length"]), rope_base=float(s["rope_base"]), tokens=int(s["tokens"]))
            for s in plan["stages"]
        )
    except (YAMLError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} is no resolved plan ({reason}): each of its stages needs name, length, rope_base and tokens") from error
    if not stages:
        raise ValueError(f"{path} has no stages: a plan needs at least one")
    return str(plan.get("name") or ""), stages


def _read_lines(path: Path, stage_number: Mapping[str, int]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Checked lines in step order (with `stage` as its number), and remarks. After a resume the later line of a step counts."""
    kept: dict[tuple[int, bool], dict[str, Any]] = {}
    newest, superseded, other, remarks = -1, 0, 0, []
    raw = path.read_bytes().split(b"\n")  # a finished last line leaves an empty rest
    for number, text in enumerate(raw, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(raw):
                remarks.append(f"The last line of metrics.jsonl (line {number}) was cut short, as by a kill; it is ignored.")
                break
            raise ValueError(f"{path} line {number} is not JSON ({error}): only an unfinished last line is ignored") from error
        if not isinstance(line, dict) or not ("loss" in line or "validation_loss" in line):
            other += 1
            continue
        line = _checked(line, f"{path} line {number}", stage_number)
        step, validation = line["step"], "validation_loss" in line
        if step < newest:  # the run was resumed from before: what followed there did not happen
            gone = [key for key in kept if key[0] > step]
            superseded += len(gone)
            for key in gone:
                del kept[key]
        newest = step
        superseded += (step, validation) in kept
        kept[step, validation] = line
    if superseded:
        remarks.append(f"The run was resumed: {superseded} lines of metrics.jsonl were overtaken by later ones; their time is not counted.")
    if other:
        remarks.append(f"{other} lines of metrics.jsonl are neither training nor validation lines; they are not shown.")
    return [kept[key] for key in sorted(kept)], tuple(remarks)


def _checked(line: dict[str, Any], where: str, stage_number: Mapping[str, int]) -> dict[str, Any]:
    """`line` with finite integer step, known stage (as its number) and floats. Raises ValueError naming `where`."""
    validation = "validation_loss" in line
    checked: dict[str, Any] = {}
    for key in ("step", *(("tokens", "validation_loss") if validation else _REQUIRED)):
        if isinstance(line.get(key), bool) or not isinstance(line.get(key), int | float):
            raise ValueError(f"{where}: {key!r} is {line.get(key)!r}: it must be a number")
        checked[key] = float(line[key])
    for key in ("step", "tokens"):
        if not math.isfinite(checked[key]) or checked[key] < 0:
            raise ValueError(f"{where}: {key!r} is {line[key]!r}: it must be a count, 0 or more")
    if line.get("stage") not in list(stage_number):  # a list, so that a value that cannot be hashed is refused too
        raise ValueError(f"{where}: stage {line.get('stage')!r} is not in plan.yaml, which has {', '.join(map(repr, stage_number))}")
    for key in () if validation else _OPTIONAL:
        value = line.get(key)
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{where}: {key!r} is {value!r}: it must be a number or null")
        checked[key] = math.nan if value is None else float(value)
    if not validation and line.get("router"):
        checked["router"] = read_router(line["router"], where)
    if not validation:
        checked["sources"] = read_sources(line, where)
        checked["gradients"] = read_gradients(line, where)
        checked["parts"] = read_parts(line, where)
    if validation and line.get("expert_load"):
        try:
            checked["expert_load"] = np.array(line["expert_load"], dtype=np.float64).reshape(len(line["expert_load"]), -1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: 'expert_load' must be one list of shares per layer, all of one length") from error
    return checked | {"step": int(line["step"]), "stage": stage_number[line["stage"]]}


def _training(lines: Iterable[dict[str, Any]]) -> Training:
    rows = list(lines)
    floats = {key: np.array([row[key] for row in rows], dtype=np.float64) for key in (*_REQUIRED, *_OPTIONAL)}
    integers = {key: np.array([row[key] for row in rows], dtype=np.int64) for key in ("step", "stage")}
    return Training(**floats, **integers)


def _validation(rows: list[dict[str, Any]]) -> Validation:
    loaded = next((row for row in reversed(rows) if "expert_load" in row), None)
    return Validation(
        step=np.array([row["step"] for row in rows], dtype=np.int64),
        stage=np.array([row["stage"] for row in rows], dtype=np.int64),
        tokens=np.array([row["tokens"] for row in rows], dtype=np.float64),
        loss=np.array([row["validation_loss"] for row in rows], dtype=np.float64),
        expert_load=None if loaded is None else loaded["expert_load"],
        expert_load_step=None if loaded is None else loaded["step"],
    )
