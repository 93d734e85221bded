"""Changes to a run that is under way: asked for one by one, checked against what was trained already, and kept in RUN/overrides.jsonl.

A run goes on only with the plan it was started with. `train --override a.b=c` changes one field of it from the next step on. It stays so: a
later call with the first recipe applies what is in the file by itself.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from minimax_train.checkpoint.commit import replace_text
from minimax_train.checkpoint.record import Progress
from minimax_train.plan import Plan, Stage

ALLOWED = ("optimizer", "guard", "auxiliary_loss", "router", "fp32_head", "experts_backend", "critical_batch", "stages")
"""Fields of a plan that may change while it runs; of a stage under way only what does not touch the steps behind it."""
FREE_UNDER_WAY = ("tokens", "batch_tokens", "batch_ramp", "learning_rate", "layout", "recompute")


def recorded(path: Path) -> list[str]:
    """The settings `a.b=c` that a run was given since it was started, in order; none where it has no such file."""
    return [line["setting"] for line in _lines(path)]


def covers(settings: list[str], change: str) -> bool:
    """Whether one of `settings` (a.b=c) asked for `change` (a.b.d: old -> new)."""
    changed = change.split(":")[0] + "."
    asked = [setting.partition("=")[0] + "." for setting in settings]
    return any(changed.startswith(path) or path.startswith(changed) for path in asked)


def record(path: Path, settings: list[str], changes: list[str], progress: Progress) -> list[str]:
    """Writes `settings` behind what the file has, with the step from which they count; returns what to say of them."""
    if recorded(path)[-len(settings) :] == settings:
        settings = []  # a kill came between this and the plan
    entry = {"step": progress.step, "tokens": progress.tokens, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changes": changes}
    lines = [*_lines(path), *({"setting": setting, **entry} for setting in settings)]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return [f"override after step {progress.step}: {change}" for change in changes]


def check(old: Plan, new: Plan, changes: list[str], progress: Progress) -> None:
    """ValueError where a change concerns what is trained already, or what a run is made of. `changes`: from old to new, but for what may
    differ anyway, such as layouts."""
    for change in changes:
        field = change.split(":")[0].split(".")[0]
        if field not in ALLOWED:
            raise ValueError(
                f"--override {change}: {field} cannot change while a run goes on; allowed: {', '.join(ALLOWED)}. Start a new run"
            )
    done = progress.stage if progress.step else 0
    begun = [stage.name for stage in old.stages[: done + 1]]
    if [stage.name for stage in new.stages[: len(begun)]] != begun:
        raise ValueError(f"--override: the stages that were begun must keep their names and order: {', '.join(begun)}")
    for before, after in zip(old.stages[:done], new.stages[:done], strict=True):
        if replace(before, layout=after.layout, recompute=after.recompute) != after:
            raise ValueError(f"--override changes stage {before.name!r}, which is finished: change a later one")
    if progress.stage < len(old.stages) and progress.stage_step:
        _check_under_way(old.stages[progress.stage], new.stages[progress.stage], progress)


def _check_under_way(old: Stage, new: Stage, progress: Progress) -> None:
    """The stage's steps so far must have been what the new stage would have had; their learning rates may have been others."""
    owner = f"--override: stage {old.name!r}, under way after {progress.stage_step} steps"
    if replace(new, **{name: getattr(old, name) for name in FREE_UNDER_WAY}) != old:
        raise ValueError(f"{owner}: only {', '.join(FREE_UNDER_WAY)} can change in it")
    rows, late = sum(mark.turns for mark in progress.sources.values()), min(old.late_from, new.late_from)
    if old.late_from != new.late_from and late < rows:
        raise ValueError(f"{owner}, has had {rows} rows: with the change mixture.late would have begun at row {late}; let it begin later")
    if new.steps < progress.stage_step or new.tokens_at(progress.stage_step) != old.tokens_at(progress.stage_step):
        raise ValueError(
            f"{owner}, {old.tokens_at(progress.stage_step)} tokens: the change would have made other batches of them; let it begin later "
            "(batch_ramp.N.from_tokens)"
        )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
