"""A run's jobs: RUN/slurm with all they need, and the chain of them in Slurm's queue.

RUN/slurm/{plan.yaml, cluster.yaml, code/, STAGE.sbatch, jobs.jsonl, events.log, logs/}. The code is a copy, so that what is edited later
does not reach a chain that runs.
"""

import json
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.cluster import Cluster
from slurm.script import job_script

ROOMS = ("minimax_train", "parallel", "data", "recipes", "slurm")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")
SOON = 60
"""Seconds that a command of Slurm may take."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage's script, and where it will be."""

    stage: str
    path: Path
    text: str


def jobs_of(*, name: str, stages: Sequence[str], run: Path, directory: Path, cluster: Cluster) -> list[Job]:
    """The jobs of a run's stages, in their order; nothing is written. ValueError as from job_script, and for stages the plan lacks."""
    unknown = [stage for stage in cluster.stages if stage not in stages]
    if unknown:
        raise ValueError(f"the cluster's file names stages {', '.join(unknown)}; what is to be submitted has {', '.join(stages)}")
    return [
        Job(
            stage=stage,
            path=run / "slurm" / f"{stage}.sbatch",
            text=job_script(name=name, stage=stage, run=run, directory=directory, cluster=cluster),
        )
        for stage in stages
    ]


def submit(jobs: Sequence[Job], *, run: Path, plan: str, cluster: str, home: Path) -> list[dict[str, Any]]:
    """Writes RUN/slurm and puts the jobs into the queue, each after the one before it has finished well; returns their ids.

    `plan` and `cluster` are the resolved YAML, `home` the folder whose rooms are copied. ValueError where a job of the run still waits or
    runs; OSError where Slurm refuses: jobs already in the queue are then taken out again.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on PATH: call submit on a login node, or look at the scripts with --dry-run")
    folder = run / "slurm"
    alive = [job for job in recorded(run) if job_state(job["job"]) is not None]
    if alive:
        listed = ", ".join(f"{job['job']} ({job['stage']})" for job in alive)
        raise ValueError(f"jobs of {run} still wait or run: {listed}: wait for them, or scancel them")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    _copy_code(home, folder / "code")
    for file, text in (("plan.yaml", plan), ("cluster.yaml", cluster), *((job.path.name, job.text) for job in jobs)):
        (folder / file).write_text(text)
    for stale in folder.glob("stalled-*"):
        stale.unlink()
    queued: list[dict[str, Any]] = []
    try:
        for job in jobs:
            after = [f"--dependency=afterok:{queued[-1]['job']}", "--kill-on-invalid-dep=yes"] if queued else []
            said = _slurm("sbatch", "--parsable", *after, str(job.path))
            queued.append({"stage": job.stage, "job": int(said.split(";")[0])})
    except OSError:
        if queued:
            _slurm("scancel", *(str(job["job"]) for job in queued))
        raise
    with (folder / "jobs.jsonl").open("a") as file_of_jobs:
        file_of_jobs.writelines(json.dumps(job) + "\n" for job in queued)
    return queued


def recorded(run: Path) -> list[dict[str, Any]]:
    """Every job that was submitted for the run, oldest first: stage, job, and `instead_of` where preflight sent it elsewhere."""
    path = run / "slurm" / "jobs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def excluded(run: Path) -> list[str]:
    """Nodes that preflight found bad."""
    path = run / "slurm" / "excluded"
    return sorted(set(path.read_text().split())) if path.exists() else []


def job_state(job: int) -> str | None:
    """PENDING, RUNNING and so on; None where the queue does not have it any more, or there is no Slurm here."""
    if shutil.which("squeue") is None:
        return None
    try:
        said = _slurm("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")
    except OSError:
        return None  # long gone
    state = said.split()[0] if said.split() else None
    return None if state in OVER else state


def _slurm(*command: str) -> str:
    """What a command of Slurm says; OSError where it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SOON, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not answer within {SOON} s: is slurmctld there?") from None
    if done.returncode:
        raise OSError(f"{' '.join(command[:2])} failed: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout.strip()


def _copy_code(home: Path, target: Path) -> None:
    """The rooms as they are now, in place of an older copy."""
    new = target.with_name(f".code-{uuid.uuid4().hex[:8]}")
    for room in ROOMS:
        shutil.copytree(home / room, new / room, ignore=shutil.ignore_patterns("__pycache__"))
    if target.exists():
        shutil.rmtree(target)
    new.rename(target)
