"""Jobs in Slurm's queue, and beside them the folder with all they need.

RUN/slurm/{plan.yaml, cluster.yaml, secrets, code/, STAGE.sbatch, jobs.jsonl, events.log, logs/}, and the like beside what other verbs
write. The code is a copy, so that what is edited later does not reach jobs that wait.
"""

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.ask import ask, check_wishes, job_state
from slurm.cluster import Cluster
from slurm.script import Verb, job_script, secrets_script, verb_script

ROOMS = ("minimax_train", "parallel", "data", "recipes", "slurm")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A script, and where it will be. `stage`: the stage's name, or the verb's."""

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


def jobs_of_verbs(verbs: Sequence[Verb], *, name: str, folder: Path, directory: Path, cluster: Cluster) -> list[Job]:
    """The same of other verbs, whose scripts are kept in `folder`."""
    return [
        Job(
            stage=verb.job,
            path=folder / f"{verb.job}.sbatch",
            text=verb_script(verb, name=name, folder=folder, directory=directory, cluster=cluster),
        )
        for verb in verbs
    ]


def submit(jobs: Sequence[Job], *, folder: Path, files: Mapping[str, str], cluster: Cluster, home: Path) -> list[dict[str, Any]]:
    """Writes `folder` and puts the jobs into the queue, each after the one before it has finished well; returns their ids.

    `files` are texts to put there too, `home` the folder whose rooms are copied. What may hold the environment is for its owner's eyes
    only. ValueError where a job submitted from the folder still waits or runs, or Slurm does not have what the cluster's file asks for;
    OSError where Slurm refuses: jobs already in the queue are then taken out again.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on PATH: call submit on a login node, or look at the scripts with --dry-run")
    check_wishes(cluster)
    alive = [job for job in recorded(folder) if job_state(job["job"]) is not None]
    if alive:
        listed = ", ".join(f"{job['job']} ({job['stage']})" for job in alive)
        raise ValueError(f"jobs of {folder} still wait or run: {listed}: wait for them, or scancel them")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    _copy_code(home, folder / "code")
    secrets = secrets_script(cluster)
    for file, text in (*files.items(), *((job.path.name, job.text) for job in jobs), *([("secrets", secrets)] if secrets else [])):
        _write_private(folder / file, text)
    for stale in folder.glob("stalled-*"):
        stale.unlink()
    queued: list[dict[str, Any]] = []
    try:
        for job in jobs:
            after = [f"--dependency=afterok:{queued[-1]['job']}", "--kill-on-invalid-dep=yes"] if queued else []
            said = ask("sbatch", "--parsable", *after, str(job.path))
            queued.append({"stage": job.stage, "job": int(said.split(";")[0])})
    except OSError:
        if queued:
            ask("scancel", *(str(job["job"]) for job in queued))
        raise
    with (folder / "jobs.jsonl").open("a") as file_of_jobs:
        file_of_jobs.writelines(json.dumps(job) + "\n" for job in queued)
    return queued


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Every job that was submitted from the folder, oldest first: stage, job, and `instead_of` where preflight sent it elsewhere."""
    path = folder / "jobs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def excluded(folder: Path) -> list[str]:
    """Nodes that preflight found bad."""
    path = folder / "excluded"
    return sorted(set(path.read_text().split())) if path.exists() else []


def _write_private(path: Path, text: str) -> None:
    """For its owner to read, also where another file stood there before."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123 # with its mode from the beginning
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def _copy_code(home: Path, target: Path) -> None:
    """The rooms as they are now, in place of an older copy."""
    new = target.with_name(f".code-{uuid.uuid4().hex[:8]}")
    for room in ROOMS:
        shutil.copytree(home / room, new / room, ignore=shutil.ignore_patterns("__pycache__"))
    if target.exists():
        shutil.rmtree(target)
    new.rename(target)
