"""What Slurm is asked on a login node, answered by stand-ins: `test_verbs` asks real daemons, which have no accounting."""

from dataclasses import replace
from pathlib import Path

import pytest

from slurm.ask import check_wishes, job_state
from slurm.cluster import Cluster, OfVerb

WISH = Cluster(nodes=1, ranks_per_node=1)


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Programs, as shell, alone on PATH."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, sinfo="echo gpu; echo cpu; echo gpu")
    check_wishes(WISH)
    check_wishes(replace(WISH, partition="gpu", jobs={"prepare": OfVerb(partition="cpu")}))
    with pytest.raises(ValueError, match=r"partition 'fat' is not one of this Slurm's: cpu, gpu"):
        check_wishes(replace(WISH, partition="gpu", jobs={"merge": OfVerb(partition="fat")}))


def test_accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this user only; where there is no accounting, or it knows nothing of the user, sbatch has the last word."""
    wish = replace(WISH, account="gold")
    answer(tmp_path, monkeypatch, sacctmgr="echo silver; echo bronze")
    with pytest.raises(ValueError, match=r"account 'gold' is not one of yours \(.*\): bronze, silver"):
        check_wishes(wish)
    for silent in ("echo gold", "exit 1", "true"):
        answer(tmp_path, monkeypatch, sacctmgr=silent)
        check_wishes(wish)


def test_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """slurmctld is gone: said, not waited for."""
    answer(tmp_path, monkeypatch, sinfo="exec /bin/sleep 60")
    monkeypatch.setattr("slurm.ask.SOON", 0.3)
    with pytest.raises(OSError, match="sinfo did not answer within"):
        check_wishes(replace(WISH, partition="gpu"))


def test_the_state_of_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives as long as one of its tasks does."""
    answer(tmp_path, monkeypatch, squeue="echo COMPLETED; echo RUNNING; echo FAILED")
    assert job_state(1) == "RUNNING"
    answer(tmp_path, monkeypatch, squeue="echo COMPLETED; echo FAILED")
    assert job_state(1) is None
    answer(tmp_path, monkeypatch, squeue="exit 1")
    assert job_state(1) is None
