"""SIGUSR1: the run saves behind the step under way and ends with status 75; called again it goes on to the same figures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from minimax_train.checkpoint.record import read_record
from minimax_train.cli import main
from minimax_train.recipe import as_yaml
from minimax_train.train.folder import RunFolder
from tests.support import little_plan
from tests.train.test_resume import figures


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stopped_and_gone_on(corpus: Path, tmp_path: Path, ranks: int) -> None:
    recipe = tmp_path / "little.yaml"
    recipe.write_text(as_yaml(little_plan(corpus)))
    command = [sys.executable, "-m", "minimax_train.cli", "train", str(recipe), "--ranks", str(ranks), "--to"]
    assert subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, timeout=200).returncode == 0
    run = tmp_path / "run"
    process = subprocess.Popen([*command, str(run)], stderr=subprocess.PIPE, text=True)
    while '"step": 2,' not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""):
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGUSR1)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 75, said
    assert "as asked: called again, the run goes on from there" in said
    stopped = int(max(float.fromhex(line[0]) for line in figures(run)))
    assert 2 <= stopped < 9 and (run / "checkpoints" / f"step-{stopped:08}" / "manifest.json").exists()
    assert not (run / "finished" / "256").exists()
    assert subprocess.run([*command, str(run)], capture_output=True, timeout=200).returncode == 0
    assert figures(run) == figures(tmp_path / "whole")
    assert sorted(path.name for path in (run / "finished").iterdir()) == ["256", "64"]


def test_marks_follow_the_plan(corpus: Path, tmp_path: Path) -> None:
    """A run that its `steps` ended is finished; with more steps it is not."""
    recipe, run = tmp_path / "little.yaml", tmp_path / "run"
    recipe.write_text(as_yaml(little_plan(corpus)))

    def train(steps: int) -> int:
        return main(["train", str(recipe), "--to", str(run), "--set", f"steps={steps}"])

    assert train(2) == 0
    assert sorted(path.name for path in (run / "finished").iterdir()) == ["256", "64"]
    assert train(7) == 0
    record = read_record(run / "checkpoints" / "step-00000007")
    RunFolder(run).mark_finished(little_plan(corpus, steps=8), record.progress)
    assert [path.name for path in (run / "finished").iterdir()] == ["64"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_process_outlives_a_killed_run(corpus: Path, tmp_path: Path, ranks: int) -> None:
    """Killed without warning right behind a save: ranks, writers and helpers of the save are gone too."""
    recipe, run = tmp_path / "little.yaml", tmp_path / "run"
    recipe.write_text(as_yaml(little_plan(corpus)))
    command = [sys.executable, "-m", "minimax_train.cli", "train", str(recipe), "--to", str(run), "--ranks", str(ranks)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "KILLED_RUN": str(run)})
    while not (run / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    end = time.monotonic() + 10.0
    while (left := [p.cmdline() for p in psutil.process_iter() if belongs(p, str(run))]) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []
    assert not (run / "finished" / "256").exists()


def belongs(process: psutil.Process, run: str) -> bool:
    try:
        return process.environ().get("KILLED_RUN") == run and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
