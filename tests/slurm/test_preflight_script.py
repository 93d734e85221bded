"""What a stage's script makes of its preflight, and when it gives up; with stand-ins for Slurm's commands."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from slurm.cluster import Cluster
from slurm.script import job_script
from tests.slurm.stubs import calls, execute, stubs


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    return stubs(tmp_path)


def run_once(place: Path, cluster: Cluster, **environment: str) -> subprocess.CompletedProcess[str]:
    run = place.parent / "run"
    text = job_script(name="little", stage="64", run=run, directory=place.parent, cluster=cluster)
    return execute(text, place, **{"STUB_TRAIN": f"mkdir -p {run}/finished; touch {run}/finished/64", **environment})


def events(place: Path) -> str:
    return (place.parent / "run" / "slurm" / "events.log").read_text()


SOUND = Cluster(nodes=2, ranks_per_node=2, time_limit="10")


def test_all_is_well(place: Path) -> None:
    """One conversation of all nodes, then training."""
    assert run_once(place, SOUND).returncode == 0
    said = [words for words in calls(place) if "--collectives" in words]
    assert len(said) == 1 and "--nodelist=n1,n2" in said[0] and "--ntasks=4" in said[0]
    assert "all ranks heard each other" in events(place) and "is finished" in events(place)


@pytest.mark.parametrize(
    ("nodes", "bad"),
    [("n1 n2 n3 n4", "n3"), ("n1 n2 n3 n4 n5", "n5"), ("n1 n2 n3 n4 n5 n6 n7", "n2 n6"), ("n1 n2", "n2"), ("n1 n2 n3", "n1")],
)
def test_the_bad_ones_are_found(place: Path, nodes: str, bad: str) -> None:
    """Pairs, then each suspect with a node that was heard well, or alone; another job goes without them."""
    assert run_once(place, SOUND, STUB_NODES=nodes, STUB_BAD=bad).returncode == 1
    assert (place.parent / "run" / "slurm" / "excluded").read_text().split() == bad.split()
    assert f"bad nodes {bad}: job 99 takes its place" in events(place)
    submitted = next(words for words in calls(place) if words[0] == "sbatch")
    assert f"--exclude={bad.replace(' ', ',')}" in submitted
    assert not any("train" in words for words in calls(place))


def test_nobody_is_better_than_the_others(place: Path) -> None:
    """As with a wrong setting of the network: nothing is excluded, and the queue is not gone round for ever."""
    for attempt in range(4):
        ended = run_once(place, SOUND, STUB_BAD="n1 n2", SLURM_RESTART_COUNT=str(attempt))
        assert ended.returncode == (1 if attempt == 3 else -9)
    assert not (place.parent / "run" / "slurm" / "excluded").exists()
    assert events(place).count("no node is worse than the others") == 4 and "giving up" in events(place)


def test_the_queue_is_not_gone_round_for_ever(place: Path) -> None:
    """Training that gets nowhere: requeued as often as allowed, then the chain ends. A newer checkpoint begins the count anew."""
    cluster, run = replace(SOUND, preflight=False, most_stalled=2), place.parent / "run"
    assert run_once(place, cluster, STUB_TRAIN="exit 9").returncode == -9
    assert run_once(place, cluster, STUB_TRAIN=f"mkdir -p {run}/checkpoints/step-00000002; exit 9").returncode == -9
    assert [run_once(place, cluster, STUB_TRAIN="exit 9").returncode for _ in range(3)] == [-9, -9, 1]
    assert "for the 3th time without a newer checkpoint than step-00000002: giving up" in events(place)
    assert sum(words[:2] == ["scontrol", "requeue"] for words in calls(place)) == 4


def test_asked_to_stop_before_it_trains(place: Path) -> None:
    """A shell dies of USR1 unless it is told otherwise, and a chain of a job that dies."""
    cluster, text = replace(SOUND, preflight=True, collectives=False), "#!/bin/bash\nkill -USR1 $PPID; sleep 0.2\n"
    (place / "srun").write_text(text + (place / "srun").read_text())
    assert run_once(place, cluster).returncode == -9
    assert "asked to stop before training began" in events(place) and not any("train" in words for words in calls(place))


def hang(run: Path, time: str, node: str) -> str:
    return f"mkdir -p {run}/logs/hang-{time}; echo {node} > {run}/logs/hang-{time}/nodes; exit 70"


def test_a_node_that_hangs_twice_is_excluded(place: Path) -> None:
    """Once may be chance; and one that is excluded already is not named again."""
    cluster, run = replace(SOUND, preflight=False), place.parent / "run"
    assert run_once(place, cluster, STUB_TRAIN=hang(run, "1", "n2")).returncode == -9
    assert run_once(place, cluster, STUB_TRAIN=hang(run, "2", "n1")).returncode == -9
    assert not (run / "slurm" / "excluded").exists()
    assert run_once(place, cluster, STUB_TRAIN=hang(run, "3", "n2")).returncode == 1
    assert (run / "slurm" / "excluded").read_text().split() == ["n2"]
    assert "ranks on n2 held the others up more than once" in events(place) and "bad nodes n2: job 99 takes its place" in events(place)
    assert run_once(place, replace(cluster, most_stalled=9), STUB_TRAIN="exit 9").returncode == -9
    assert (run / "slurm" / "excluded").read_text().split() == ["n2"]


def test_bad_input_is_not_tried_again(place: Path) -> None:
    assert run_once(place, replace(SOUND, preflight=False), STUB_TRAIN="exit 2").returncode == 2
    assert "refused as bad input" in events(place) and not any(words[:2] == ["scontrol", "requeue"] for words in calls(place))


def test_not_under_slurm(place: Path) -> None:
    """Called by hand, without a job's variables: the one that is missing is named, and nothing is done."""
    text = job_script(name="little", stage="64", run=place.parent / "run", directory=place.parent, cluster=SOUND)
    done = subprocess.run(["env", "-i", f"PATH={place}:/usr/bin:/bin", f"STUB={place}", "bash"], input=text, capture_output=True, text=True)
    assert done.returncode != 0 and "SLURM_JOB_ID" in done.stderr
    assert not (place / "calls").exists()


def test_a_bound_on_the_bandwidth(place: Path) -> None:
    """Only where the cluster's file has one."""
    run_once(place, SOUND)
    run_once(place, replace(SOUND, least_gb_per_s=12.5))
    first, second = [words for words in calls(place) if "--collectives" in words]
    assert "--least" not in first and second[second.index("--least") + 1] == "12.5"
