"""A conversion that is killed, joined, refused or out of room: what appears is whole, and the same to the byte."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimax_train.checkpoint.manifest import damage
from minimax_train.convert.from_hf import from_hf
from minimax_train.convert.to_hf import to_hf
from minimax_train.convert.work import conversion
from tests.support import FIXTURE

SMALL = 60_000  # bytes in a file: some twenty of them
Convert = Callable[[Path, Path], Any]


def incoming(source: Path, target: Path) -> None:
    from_hf(source, target, shard_bytes=SMALL, workers=2)


def outgoing(source: Path, target: Path) -> None:
    to_hf(source, target, "minimax_m1", shard_bytes=SMALL, workers=2)


def started(convert: Convert, source: Path, target: Path) -> multiprocessing.process.BaseProcess:
    """The conversion in a process of its own, with a process group of its own."""
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(convert, source, target))
    process.start()
    return process


def _alone(convert: Convert, source: Path, target: Path) -> None:
    os.setpgid(0, 0)
    convert(source, target)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "checkpoint"
    incoming(FIXTURE, path)
    return path


@pytest.mark.parametrize("convert", [incoming, outgoing])
def test_killed_at_ten_random_points(tmp_path: Path, checkpoint: Path, convert: Convert) -> None:
    """SIGKILL of the whole process group, again and again; then it goes on, and every byte is an undisturbed run's."""
    source = FIXTURE if convert is incoming else checkpoint
    begin = time.monotonic()
    convert(source, tmp_path / "undisturbed")
    seconds = time.monotonic() - begin
    draw, met = random.Random(3), 0
    for _ in range(10):
        process = started(convert, source, tmp_path / "target")
        time.sleep(draw.uniform(0.02, 0.6) * seconds)
        met += (tmp_path / ".partial-target").exists()
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()
        if (tmp_path / "target").exists():
            break
    assert met >= 2, "no kill met the conversion at work: the test shows nothing"
    if not (tmp_path / "target").exists():
        convert(source, tmp_path / "target")
    with pytest.raises(ValueError, match="already exists"):
        convert(source, tmp_path / "target")  # and what is left of a kill right after the rename is gone now
    assert contents(tmp_path / "target") == contents(tmp_path / "undisturbed")
    assert len(contents(tmp_path / "target")) > 15
    assert sorted(p.name for p in tmp_path.iterdir()) == ["target", "undisturbed"]


def test_finished_shards_are_not_done_again(tmp_path: Path) -> None:
    """What a killed process finished is kept as it is: its times do not change."""
    process = started(incoming, FIXTURE, tmp_path / "target")
    done = tmp_path / ".partial-target" / "done"
    while not (done.exists() and len(list(done.glob("*.json"))) >= 3):
        assert process.is_alive() or (tmp_path / "target").exists()
        time.sleep(0.001)
    os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "target").exists(), "it was through before it could be killed"
    finished = [path.stem for path in done.glob("*.json")]
    times = {name: (done.parent / "result" / "tensors" / name).stat().st_mtime_ns for name in finished}
    incoming(FIXTURE, tmp_path / "target")
    assert {name: (tmp_path / "target" / "tensors" / name).stat().st_mtime_ns for name in finished} == times
    assert damage(tmp_path / "target") is None


@pytest.mark.parametrize("convert", [incoming, outgoing])
def test_processes_that_share_the_work(tmp_path: Path, checkpoint: Path, convert: Convert) -> None:
    """The same call three times at once, as on three machines of one disk: all succeed or find it finished, and the result is one's."""
    source = FIXTURE if convert is incoming else checkpoint
    convert(source, tmp_path / "alone")
    processes = [started(convert, source, tmp_path / "target") for _ in range(3)]
    for process in processes:
        process.join(60)
    assert (tmp_path / "target").exists()
    assert sum(process.exitcode == 0 for process in processes) >= 1  # a late one may find the target there already, which it refuses
    assert contents(tmp_path / "target") == contents(tmp_path / "alone")
    assert not (tmp_path / ".partial-target").exists()


def interrupted(source: Path, target: Path, **options: Any) -> None:
    """Leaves an unfinished conversion behind: the disk takes no file as long as a shard."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            from_hf(source, target, shard_bytes=SMALL, **options)
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG else 8)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert not target.exists()


def test_a_disk_that_takes_no_more(tmp_path: Path, checkpoint: Path) -> None:
    """The error is the disk's; no half file is left, nothing has the target's name; with room again the same call goes on."""
    interrupted(FIXTURE, tmp_path / "target")
    assert not list(tmp_path.rglob("*.partial"))
    incoming(FIXTURE, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(checkpoint)


def test_a_disk_too_small_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"needs 1,000,000,000,000.00 GB"), conversion(tmp_path / "target", {}, 10**21):
        pass
    assert not list(tmp_path.iterdir())


def test_another_conversion_may_not_go_on(tmp_path: Path) -> None:
    interrupted(FIXTURE, tmp_path / "target")
    with pytest.raises(ValueError, match="unfinished conversion that differs in precision"):
        from_hf(FIXTURE, tmp_path / "target", cast="bf16", shard_bytes=SMALL)
    source = tmp_path / "source"
    shutil.copytree(FIXTURE, source)
    os.utime(source / "model.safetensors")
    with pytest.raises(ValueError, match="differs in source"):
        incoming(source, tmp_path / "target")
    incoming(FIXTURE, tmp_path / "target")  # and the one that was begun is as it was


def test_bad_numbers_found_on_the_way_leave_nothing(tmp_path: Path) -> None:
    """Every tensor of a shard that is not finite is named."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURE, source)
    tensors = load_file(FIXTURE / "model.safetensors")
    bad = ["model.layers.2.self_attn.qkv_proj.weight", "model.layers.3.block_sparse_moe.experts.1.w2.weight", "model.norm.weight"]
    for name, value in zip(bad, (float("nan"), float("inf"), -float("inf")), strict=True):
        tensors[name].view(-1)[-1] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=f"NaN or infinity in 3: {', '.join(bad)}"):
        from_hf(source, tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 500, 1000])
def test_one_bad_number_anywhere_is_seen(dtype: torch.dtype, value: float, place: int) -> None:
    from minimax_train.convert.cast import is_finite

    x = torch.randn(1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(x)
    x[place] = value
    assert not is_finite(x)
