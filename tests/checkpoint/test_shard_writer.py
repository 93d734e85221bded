"""A rank's forked writer: it writes what was there at the fork, is found dead or stuck within its limit, and dies with the rank."""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from minimax_train.checkpoint.manifest import checksum
from minimax_train.engine.shard_writer import Pinned, ShardWriter, index_of
from minimax_train.engine.torch_dist import read_index, write_index

NUMBERS = 4_000_000


def state_of(x: torch.Tensor) -> dict[str, Any]:
    return {"x": ShardedTensor.from_rank_offsets("x", x), "again": ShardedTensor.from_rank_offsets("x", x, replica_id=1)}


def waited_for(writer: ShardWriter, silent: float = 30.0, limit: float = 10.0) -> str | None:
    end = time.monotonic() + limit
    while writer.failure(silent) is None and not writer.done:
        assert time.monotonic() < end
        time.sleep(0.005)
    return writer.failure(silent)


def test_what_was_there_at_the_fork(tmp_path: Path) -> None:
    x = torch.arange(NUMBERS, dtype=torch.float32)
    writer = ShardWriter(state_of(x), tmp_path, 0, Pinned())
    os.kill(writer.pid, signal.SIGSTOP)
    x.zero_()
    os.kill(writer.pid, signal.SIGCONT)
    assert waited_for(writer) is None
    part = writer.part()
    assert (part.size, part.checksum) == ((tmp_path / part.file).stat().st_size, checksum(tmp_path / part.file))
    write_index(tmp_path, index_of([part]))
    assert read_index(tmp_path) == index_of([part])
    assert torch.equal(torch.load(tmp_path / part.file), torch.arange(NUMBERS, dtype=torch.float32))


def test_a_part_of_a_larger_storage(tmp_path: Path) -> None:
    """Such as a slice of stacked matrices: what is written is the slice alone."""
    x = torch.arange(12.0).view(3, 4)[:, 1:3]
    writer = ShardWriter(state_of(x), tmp_path, 3, Pinned())
    assert waited_for(writer) is None
    assert torch.equal(torch.load(tmp_path / "__3_0.distcp"), x)
    assert (tmp_path / "__3_0.distcp").stat().st_size < 2000


@pytest.mark.parametrize(
    ("number", "says"),
    [(signal.SIGKILL, r"died, exit code -9"), (signal.SIGSTOP, "wrote nothing for 0.4 s")],
)
def test_killed_or_stopped(tmp_path: Path, number: int, says: str) -> None:
    writer = ShardWriter(state_of(torch.zeros(40_000_000)), tmp_path, 0, Pinned())
    os.kill(writer.pid, number)
    begin = time.monotonic()
    assert says in str(waited_for(writer, silent=0.4))
    assert time.monotonic() - begin < 3
    assert not Path(f"/proc/{writer.pid}").exists()


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))  # beyond it a write fails as on a full disk
    try:
        writer = ShardWriter(state_of(torch.zeros(NUMBERS)), tmp_path, 0, Pinned())
        assert "File too large" in str(waited_for(writer))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _begin_and_wait(folder: Path, pipe: Any) -> None:
    writer = ShardWriter(state_of(torch.zeros(NUMBERS)), folder, 0, Pinned())
    while not (folder / "__0_0.distcp").exists():
        time.sleep(0.001)
    os.kill(writer.pid, signal.SIGSTOP)
    pipe.send(writer.pid)
    time.sleep(60)


def test_it_does_not_outlive_its_rank(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_begin_and_wait, args=(tmp_path, theirs))
    process.start()
    writer = ours.recv()
    process.kill()
    process.join()
    end = time.monotonic() + 5
    while Path(f"/proc/{writer}").exists() and Path(f"/proc/{writer}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)
