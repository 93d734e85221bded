"""Places in the world, layouts, and ranks that torchrun and --ranks start."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from minimax_train.recipe import as_yaml
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place, find_place, meet
from tests.support import little_plan

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70001"}


def test_launchers_are_recognised() -> None:
    assert find_place({}) is None
    assert find_place(TORCHRUN) == Place(rank=3, size=8, local_rank=1, address="n1:29500")
    assert find_place({**SRUN, "MASTER_ADDR": "n1"}) == Place(rank=3, size=4, local_rank=1, address="n1:30001")
    assert find_place({**SRUN, "SLURM_SRUN_COMM_HOST": "10.0.0.1"}) == Place(rank=3, size=4, local_rank=1, address="10.0.0.1:30001")
    assert find_place({**SRUN, "MASTER_ADDR": "n1", "SLURMD_NODENAME": "gpu07"}) == Place(
        rank=3, size=4, local_rank=1, address="n1:30001", node="gpu07"
    )


def test_a_batch_script_is_not_a_step_of_srun() -> None:
    """sbatch sets SLURM_PROCID for the script itself: `--ranks N` must still work there."""
    batch = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert find_place(batch) is None


def test_a_broken_environment_names_the_variable() -> None:
    with pytest.raises(ValueError, match="MASTER_PORT is None"):
        find_place({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"})
    with pytest.raises(ValueError, match="SLURM_LOCALID is 'x'"):
        find_place({**SRUN, "SLURM_LOCALID": "x"})


def test_layouts() -> None:
    assert Layout().data(8) == 8
    for name in ("tensor", "pipeline", "context", "expert", "expert_tensor"):
        with pytest.raises(ValueError, match=f"layout.{name} is 0"):
            Layout(**{name: 0})
    with pytest.raises(ValueError, match=r"layout.token_groups is -1; use at least 1, or 0"):
        Layout(token_groups=-1)
    layout = Layout(tensor=2, context=4)
    assert (layout.data(16), layout.pieces, Layout().pieces) == (2, 8, 1)
    with pytest.raises(ValueError, match=r"12 ranks .* pipeline\*context\*tensor = 8"):
        layout.data(12)
    assert Layout(expert=4, expert_tensor=2, tensor=2).data(16) == 8
    with pytest.raises(ValueError, match=r"12 ranks .* pipeline\*expert\*expert_tensor = 8"):
        Layout(expert=4, expert_tensor=2, tensor=2).data(12)
    with pytest.raises(ValueError, match=r"layout.key_value is 3, layout.context 4"):
        Layout(context=4, key_value=3)
    with pytest.raises(ValueError, match=r"layout.decay_cut is 0"):
        Layout(decay_cut=0.0)
    layout.check_length("a row", 64)
    for tokens, nearest in ((60, 56), (4, 8)):
        with pytest.raises(ValueError, match=rf"a row is {tokens}, not a multiple of 8 \(.*\): use {nearest}"):
            layout.check_length("a row", tokens)


def _fail_on_one(place: Place) -> Any:
    from minimax_train.engine.session import session
    from parallel.collectives import first_does, raise_together

    with session(place=place) as joined:
        outcomes = []
        for work in (lambda: _raise(ValueError("bad")), lambda: _raise(OSError("disk"))):
            try:
                first_does(work, joined.groups.world)
            except (ValueError, OSError) as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        try:
            raise_together(OSError("only here") if place.rank == 1 else None, joined.groups.world)
        except OSError as error:
            outcomes.append(str(error))
        return outcomes


def _raise(error: Exception) -> None:
    raise error


def test_every_rank_hears_of_an_error() -> None:
    assert run_ranks(2, _fail_on_one) == [["ValueError: bad", "OSError: disk", "only here"]] * 2


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed"):
        run_ranks(2, _die)


def _die(place: Place) -> None:
    if place.rank == 1:
        os._exit(3)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def test_torchrun_srun_and_local_ranks_give_the_same_curve(corpus: Path, tmp_path: Path) -> None:
    """Two ranks each way. srun is stood for by its variables here; its daemons are tested with the Slurm recipes."""
    recipe = tmp_path / "little.yaml"
    recipe.write_text(as_yaml(little_plan(corpus, steps=2)))
    verb = ["-m", "minimax_train.cli", "train", str(recipe), "--to"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    local = subprocess.run([sys.executable, *verb, str(tmp_path / "local"), "--ranks", "2"], env=environment, capture_output=True)
    assert local.returncode == 0, local.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, *verb, str(tmp_path / "torchrun")], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    port = str(20_000 + os.getpid() % 20_000)
    slurm = {**environment, **SRUN, "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    tasks = [
        subprocess.Popen(
            [sys.executable, *verb, str(tmp_path / "srun")],
            env={**slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0]
    assert losses(tmp_path / "local") == losses(tmp_path / "torchrun") == losses(tmp_path / "srun")
    assert len(losses(tmp_path / "local")) == 2


def test_an_attempt_does_not_read_what_an_earlier_one_left() -> None:
    """torchrun's agent keeps one store for all its restarts."""
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = f"127.0.0.1:{host.port}"
    first, second = (meet(Place(size=2, address=address, hosted=True, attempt=attempt)) for attempt in (0, 1))
    first.set("address of rank 0", "stale")
    assert first.check(["address of rank 0"]) and not second.check(["address of rank 0"])
    assert find_place({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}).attempt == 2  # type: ignore[union-attr]
