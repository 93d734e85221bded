"""The run directory: its files, and who may write to it."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from minimax_train.checkpoint.commit import replace_text
from minimax_train.checkpoint.record import Progress
from minimax_train.plan import Plan
from minimax_train.recipe import as_plan, as_tree, as_yaml, differences
from minimax_train.train import override

CHANGEABLE = ("steps", "checkpoints", "validation", "layout", "name")


class RunFolder:
    """Names of everything under RUN."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.yaml"
        self.metrics = path / "metrics.jsonl"
        self.facts = path / "run.json"
        self.overrides = path / "overrides.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.positions = path / "evaluation" / "positions.json"
        self.needle = path / "evaluation" / "needle.json"
        self.logs = path / "logs"
        self.finished = path / "finished"

    def require(self) -> "RunFolder":
        """ValueError where this is no run."""
        if not self.plan.is_file():
            raise ValueError(f"{self.path} is not a run: it has no plan.yaml; give the folder that `train --to` wrote")
        return self

    def load_plan(self) -> Plan:
        """The plan the run was started with."""
        self.require()
        tree: dict[str, Any] = YAML(typ="safe", pure=True).load(self.plan)
        return as_plan(tree)

    def adopt(self, plan: Plan, overrides: list[str], progress: Progress) -> list[str]:
        """Makes the folder this plan's: a new run, or the same one going on from `progress`; returns what to say of it. ValueError listing
        what may not change.

        A run may go on with other `steps`, checkpoint and validation intervals, layout, recomputation, data workers and ranks; with
        something else only where `overrides` ask for it.
        """
        notes: list[str] = []
        if self.plan.exists():
            old = self.load_plan()
            changes = differences(_what_stays(plan), _what_stays(old))
            refused = [change for change in changes if not override.covers([*override.recorded(self.overrides), *overrides], change)]
            if refused:
                raise ValueError(
                    f"run {self.path} was started with another plan (its own -> yours): {'; '.join(refused)}; use a new --to for a new "
                    "run, or --override a.b=c to change this one"
                )
            override.check(old, plan, changes, progress)
            notes = override.record(self.overrides, overrides, changes, progress) if changes else []
        elif overrides:
            raise ValueError(f"--override changes a run that was begun, and {self.path} is none yet: use --set")
        elif self.path.exists() and any(p.name not in ("lock", "slurm") for p in self.path.iterdir()):
            raise ValueError(f"{self.path} exists and is not a run: choose another --to")
        for folder in (self.path, self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.plan, as_yaml(plan))
        return notes

    def mark_finished(self, plan: Plan, progress: Progress) -> None:
        """An empty file finished/NAME for every stage that nothing is left of, and for no other: what a job script can see."""
        over = len(plan.stages) if progress.step >= plan.total_steps else progress.stage
        self.finished.mkdir(exist_ok=True)
        for number, stage in enumerate(plan.stages):
            if number < over:
                (self.finished / stage.name).touch()
            else:
                (self.finished / stage.name).unlink(missing_ok=True)

    def write_facts(self, facts: dict[str, Any]) -> None:
        """`run.json`: what ran where."""
        replace_text(self.facts, json.dumps(facts, indent=1))


def _what_stays(plan: Plan) -> dict[str, Any]:
    """The fields in which a run must not change."""
    tree = {name: value for name, value in as_tree(plan).items() if name not in CHANGEABLE}
    tree["data"] = {name: value for name, value in tree["data"].items() if name != "workers"}
    tree["stages"] = [{name: value for name, value in stage.items() if name not in ("recompute", "layout")} for stage in tree["stages"]]
    return tree


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """One training process at a time; ValueError where another holds the run. The lock dies with its process."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file: --to needs a folder, new or a run's")
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {run}: wait for it, stop it, or choose another --to") from None
        yield
