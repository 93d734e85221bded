"""Chains of stages on real Slurm daemons: to the end, through time limits, bad nodes and dead ones, and not past a broken stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minimax_train.recipe import as_yaml
from parallel.layout import Layout
from slurm.submit import recorded
from tests.slurm.daemons import Slurm, machine
from tests.support import little_plan
from tests.train.test_resume import figures

pytestmark = pytest.mark.timeout(400)
HOME = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "little.yaml"
    path.write_text(as_yaml(little_plan(corpus, layout=Layout(context=2))))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same plan on as many local ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for ranks in (2, 4):
        command = [sys.executable, "-m", "minimax_train.cli", "train", str(recipe), "--to", str(folder / str(ranks)), "--ranks", str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HOME)
        assert done.returncode == 0, done.stderr
    return {ranks: folder / str(ranks) for ranks in (2, 4)}


def submit(slurm: Slurm, recipe: Path, run: Path, cluster: Path, *more: str) -> list[int]:
    command = [sys.executable, "-m", "minimax_train.cli", "submit", str(recipe), "--to", str(run), "--cluster", str(cluster), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=slurm.environment, cwd=HOME)
    assert done.returncode == 0, done.stderr
    return [job["job"] for job in recorded(run / "slurm")]


def events(run: Path) -> str:
    return (run / "slurm" / "events.log").read_text()


def log(run: Path) -> str:
    """For a failed assertion."""
    return "\n".join(path.read_text()[-3000:] for path in sorted((run / "slurm" / "logs").glob("*"))) + events(run)


def test_a_chain_runs_to_the_end(slurm: Slurm, recipe: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """Two stages, two jobs, on two nodes with two ranks each: the figures of four local ranks. Edits behind it are not seen."""
    run = tmp_path / "run"
    first, second = submit(slurm, recipe, run, machine(tmp_path, ranks_per_node=2, collectives=True))
    assert slurm.job(second)["Dependency"].startswith(f"afterok:{first}")
    assert slurm.ended(first) == "COMPLETED", log(run)
    assert slurm.ended(second) == "COMPLETED", log(run)
    assert figures(run) == figures(undisturbed[4])
    assert events(run).count("is finished") == 2 and events(run).count("all ranks heard each other; all-reduce of 8,388,608 bytes") == 2
    status = [sys.executable, "-m", "minimax_train.cli", "status", str(run), "--json"]
    said = json.loads(subprocess.run(status, capture_output=True, text=True, env=slurm.environment, timeout=60, check=True).stdout)
    assert said["finished"] and [(job["stage"], job["state"]) for job in said["jobs"]] == [("64", "ended"), ("256", "ended")]


def test_asked_to_stop_it_goes_back_into_the_queue(slurm: Slurm, recipe: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """USR1, as Slurm sends it before the time limit: saved, requeued, gone on, bit for bit."""
    run = tmp_path / "run"
    first, second = submit(slurm, recipe, run, machine(tmp_path, preflight=False))
    metrics = run / "metrics.jsonl"
    slurm.until(lambda: metrics.exists() and '"step": 2,' in metrics.read_text(), "step 2")
    slurm.run("scancel", "--signal=USR1", "--batch", str(first))
    assert slurm.ended(second, 200) == "COMPLETED", log(run)
    assert "asking the run to save" in events(run) and "stopped as asked" in events(run)
    assert slurm.job(first)["Restarts"] == "1"
    assert figures(run) == figures(undisturbed[2])


def test_a_broken_stage_stops_the_chain(slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
    """The first stage's ranks die at once, every time: after the attempts allowed the job fails, and the second is cancelled."""
    run = tmp_path / "run"
    first, second = submit(slurm, recipe, run, machine(tmp_path, preflight=False, most_stalled=1, python="false"))
    assert slurm.ended(first) == "FAILED" and slurm.ended(second) == "CANCELLED"
    assert "for the 2th time without a newer checkpoint" in events(run) or "giving up" in events(run)
    assert slurm.job(first)["Restarts"] == "1"


def test_preflight_sends_it_elsewhere(slurm: Slurm, recipe: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """A node whose interpreter is broken: another job takes the place, without that node, and the chain waits for that one."""
    run = tmp_path / "run"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $SLURMD_NODENAME == n1 ]] && exit 3\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    first, second, *_ = submit(slurm, recipe, run, machine(tmp_path, python=str(python)))  # the other job may be there already
    assert slurm.ended(second, 200) == "COMPLETED", log(run)
    assert slurm.job(first)["JobState"] == "FAILED"
    instead = next(job for job in recorded(run / "slurm") if job.get("instead_of") == first)
    assert slurm.job(instead["job"])["JobState"] == "COMPLETED" and "n1" not in slurm.job(instead["job"])["NodeList"]
    assert (run / "slurm" / "excluded").read_text().split() == ["n1"]
    assert "preflight: n1: no answer" in events(run)
    assert figures(run) == figures(undisturbed[2])


@pytest.mark.slow
def test_a_node_whose_ranks_hang(slurm: Slurm, recipe: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """Its ranks stop when they should talk to the others: found by themselves, excluded; the run is trained elsewhere."""
    run = tmp_path / "run"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $SLURMD_NODENAME == n2 && $* == *--collectives* ]] && kill -STOP $$\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    first, second, *_ = submit(slurm, recipe, run, machine(tmp_path, python=str(python), collectives=True, collectives_seconds=25))
    assert slurm.ended(second, 350) == "COMPLETED", log(run)
    assert slurm.job(first)["JobState"] == "FAILED" and (run / "slurm" / "excluded").read_text().split() == ["n2"]
    assert "nothing came within 25 s" in events(run)
    assert figures(run) == figures(undisturbed[2])


def test_a_node_that_dies(slurm: Slurm, recipe: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """kill -9 of a node's daemon and everything on it: requeued on other nodes, the same figures."""
    run = tmp_path / "run"
    first, second = submit(slurm, recipe, run, machine(tmp_path, preflight=False))
    metrics = run / "metrics.jsonl"
    slurm.until(lambda: metrics.exists() and '"step": 3,' in metrics.read_text(), "step 3")
    victim = next(
        node for node in slurm.nodes if node in slurm.run("scontrol", "show", "hostnames", slurm.job(first)["NodeList"]).split()[1:]
    )
    slurm.kill_node(victim)
    try:
        assert slurm.ended(second, 250) == "COMPLETED", log(run)
        assert figures(run) == figures(undisturbed[2])
    finally:
        slurm.start_node(victim)
        slurm.until(lambda: slurm.run("sinfo", "-h", "-n", victim, "-o", "%t") == "idle", f"{victim} back")


def test_cancelled(slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
    """scancel of the first job takes the chain with it; submitted again it goes on."""
    run, cluster = tmp_path / "run", machine(tmp_path, preflight=False)
    first, second = submit(slurm, recipe, run, cluster)
    command = [sys.executable, "-m", "minimax_train.cli", "submit", str(recipe), "--to", str(run), "--cluster", str(cluster)]
    again = subprocess.run(command, capture_output=True, text=True, timeout=100, env=slurm.environment, cwd=HOME)
    assert again.returncode == 2 and f"{first} (64)" in again.stderr
    metrics = run / "metrics.jsonl"
    slurm.until(lambda: metrics.exists() and '"step": 2,' in metrics.read_text(), "step 2")
    slurm.run("scancel", str(first))
    assert slurm.ended(first) == "CANCELLED" and slurm.ended(second) == "CANCELLED"
    assert len(submit(slurm, recipe, run, cluster)) == 4
    slurm.run("scancel", *(str(job) for job in [job["job"] for job in recorded(run / "slurm")][2:]))
    assert (run / "slurm" / "code" / "minimax_train" / "cli.py").exists()
