"""A run that is killed, damaged or interrupted goes on as if nothing had happened."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minimax_train.checkpoint.shelf import checkpoints_in
from minimax_train.cli import main
from minimax_train.recipe import as_yaml
from tests.support import little_plan


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "minimax_train.cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A verb to its end. Of one rank in this process: starting one costs six seconds each time."""
    if "--ranks" in arguments:
        return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=200)
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), error.getvalue())


def figures(run_folder: Path) -> list[tuple[Any, ...]]:
    """Every line's exact numbers that do not depend on the clock."""
    kept = ("step", "tokens", "length", "rope_base", "loss", "grad_norm", "lr", "validation_loss")
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [tuple(float(v).hex() for k in kept if (v := json.loads(line).get(k)) is not None) for line in lines]


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "little.yaml"
    path.write_text(as_yaml(little_plan(corpus)))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 steps through both stages in one go."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run("train", recipe, "--to", folder)
    assert done.returncode == 0, done.stderr
    assert len([f for f in figures(folder) if len(f) == 7]) == 9
    return folder


def kill_at_step(recipe: Path, folder: Path, step: int, *options: object) -> None:
    """Starts training and kills the whole process group, without warning, when the line of `step` appears."""
    process = subprocess.Popen(
        command("train", recipe, "--to", folder, *options), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    metrics = folder / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("steps", [(1,), (3, 7)])
def test_killed_runs_give_the_same_figures(recipe: Path, undisturbed: Path, tmp_path: Path, steps: tuple[int, ...]) -> None:
    """SIGKILL before the first checkpoint, in the first stage, and in the second: every loss to the last bit."""
    for step in steps:
        kill_at_step(recipe, tmp_path / "run", step)
    done = run("train", recipe, "--to", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "run") == figures(undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial-*"))


def test_stopped_by_steps_and_gone_on_with_two_ranks(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    """`steps` bounds the run; going on with other ranks gives the same curve to summation order."""
    assert run("train", recipe, "--to", tmp_path / "run", "--set", "steps=4").returncode == 0
    done = run("train", recipe, "--to", tmp_path / "run", "--ranks", 2)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        {f[0]: [float.fromhex(x) for x in f] for f in figures(folder) if len(f) == 7} for folder in (tmp_path / "run", undisturbed)
    )
    assert ours.keys() == theirs.keys()
    for step, numbers in theirs.items():
        assert ours[step] == pytest.approx(numbers, rel=2e-5)


def test_gone_on_under_another_layout(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Begun by two pipeline ranks in turns; gone on, in the second stage, by one that runs its layers twice. The same curve and scores."""
    options = ("--ranks", 2, "--set", "layout.pipeline=2", "--set", "layout.virtual_pipeline=2", "--set", "steps=8")
    begun = run("train", recipe, "--to", tmp_path / "run", *options)
    assert begun.returncode == 0, begun.stderr
    assert "warning: the dearest of 2 pipeline stages costs 1.23 times the mean at length 256" in begun.stderr
    done = run("train", recipe, "--to", tmp_path / "run", "--set", "stages.0.recompute=full", "--set", "stages.1.recompute=full")
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(figures(tmp_path / "run"), figures(undisturbed), strict=True):
        assert [float.fromhex(x) for x in ours] == pytest.approx([float.fromhex(x) for x in theirs], rel=2e-5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    assert run("train", recipe, "--to", tmp_path / "run", "--set", "steps=6").returncode == 0
    newest = checkpoints_in(tmp_path / "run" / "checkpoints")[-1]
    victim = next((newest / "tensors").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    listed = run("checkpoint", "verify", tmp_path / "run")
    assert listed.returncode == 1
    assert f"{newest}: tensors/{victim.name} was changed" in listed.stdout
    done = run("train", recipe, "--to", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"damaged checkpoint {newest} (tensors/{victim.name} was changed" in done.stderr
    assert "going on from" in done.stderr
    assert len(list(newest.parent.glob("damaged-step-00000006-*"))) == 1
    assert figures(tmp_path / "run") == figures(undisturbed)


def test_a_finished_run_has_nothing_to_do(recipe: Path, undisturbed: Path) -> None:
    before = figures(undisturbed)
    done = run("train", recipe, "--to", undisturbed)
    assert done.returncode == 0, done.stderr
    assert figures(undisturbed) == before


def test_another_plan_is_refused(recipe: Path, undisturbed: Path) -> None:
    done = run("train", recipe, "--to", undisturbed, "--set", "optimizer.beta2=0.9")
    assert done.returncode == 2
    assert "optimizer.beta2: 0.95 -> 0.9" in done.stderr


def test_status_report_and_checkpoint_list(undisturbed: Path) -> None:
    status = json.loads(run("status", undisturbed, "--json").stdout)
    assert (status["step"], status["finished"], status["tokens"]) == (9, True, 6 * 256 + 3 * 512)
    listed = run("checkpoint", "list", undisturbed)
    names = [Path(line.split(":")[0]).name for line in listed.stdout.splitlines()]
    assert names == ["step-00000006", "step-00000008", "step-00000009"]  # the newest three; 6 ends a stage
    assert listed.stdout.count("intact") == 3
