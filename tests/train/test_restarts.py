"""A rank dies, the launcher starts the ranks again, and the curve is that of an undisturbed run to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from minimax_train.plan import Checkpoints
from minimax_train.recipe import as_yaml
from tests.support import little_plan

LOCAL = ("--ranks", "2", "--restarts", "2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
CLI = ("-m", "minimax_train.cli", "train")


def losses(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [float(line["loss"]).hex() for line in map(json.loads, lines) if "loss" in line]


def begin(recipe: Path, run: Path, launcher: str) -> subprocess.Popen[bytes]:
    front, back = ((), LOCAL) if launcher == "local" else (TORCHRUN, ())
    command = [sys.executable, *front, *CLI, str(recipe), "--to", str(run), *back]
    return subprocess.Popen(command, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, stderr=subprocess.PIPE)


def ranks_of(launcher: int) -> list[int]:
    """torchrun's children; ours are forked by a server."""
    children = psutil.Process(launcher).children()
    servers = [child for child in children if "multiprocessing.forkserver" in str(child.cmdline())]
    ranks = servers[0].children() if servers else [child for child in children if "minimax_train.cli" in str(child.cmdline())]
    return sorted(rank.pid for rank in ranks)


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "little.yaml"
    path.write_text(as_yaml(little_plan(corpus, checkpoints=Checkpoints(every_steps=2, keep=2))))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run([sys.executable, *CLI, str(recipe), "--to", str(run), "--ranks", "2"], capture_output=True, check=True, timeout=200)
    return run


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("local", signal.SIGSTOP),
        ("torchrun", signal.SIGKILL),
        pytest.param("local", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("torchrun", signal.SIGSTOP, marks=pytest.mark.slow),
    ],
    ids=["stopped, local", "killed, torchrun", "killed, local", "stopped, torchrun"],
)
def test_it_goes_on(recipe: Path, undisturbed: Path, tmp_path: Path, launcher: str, number: int) -> None:
    run = tmp_path / "run"
    process = begin(recipe, run, launcher)
    while len(losses(run)) < 4:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.005)
    os.kill(ranks_of(process.pid)[-1], number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()
    assert losses(run) == losses(undisturbed)
    assert len(losses(run)) == 9
    if launcher == "local":
        assert b"starting again (1 left)" in said
    assert bool(list((run / "logs").glob("hang-*/verdict.json"))) == (number == signal.SIGSTOP)
