"""Where a run stands, read from its folder alone."""

from pathlib import Path
from typing import Any

from minimax_train.checkpoint.shelf import describe, looks_whole, newest_verified
from minimax_train.train.folder import RunFolder
from minimax_train.train.metrics import read_metrics


def run_status(run: Path) -> dict[str, Any]:
    """Figures of the last step, the last validation and the newest checkpoint that verifies."""
    folder = RunFolder(run).require()
    plan = folder.load_plan()
    lines = read_metrics(folder.metrics)
    steps = [line for line in lines if "loss" in line]
    scored = [line for line in lines if "validation_loss" in line]
    newest, passed = newest_verified(folder.checkpoints, looks_whole)
    status: dict[str, Any] = {
        "run": str(run),
        "plan": plan.name,
        "step": steps[-1]["step"] if steps else 0,
        "total_steps": plan.total_steps,
    }
    if steps:
        last = steps[-1]
        seconds = sum(line["step_seconds"] for line in steps[-5:]) / len(steps[-5:])
        status |= {name: last[name] for name in ("stage", "tokens", "loss", "tokens_per_second")}
        status["seconds_left_in_stage"] = round(seconds * _steps_left(plan, last))
    if scored:
        status["validation_loss"] = scored[-1]["validation_loss"]
    status |= {"finished": status["step"] >= plan.total_steps, "checkpoint": str(newest) if newest else None, "damaged": describe(passed)}
    return status


def _steps_left(plan: Any, last: dict[str, Any]) -> int:
    """Steps of the current stage still to come, at its recent speed (another length has another speed)."""
    done = 0
    for stage in plan.stages:
        done += stage.steps
        if stage.name == last["stage"]:
            break
    return max(0, min(done, plan.total_steps) - last["step"])
