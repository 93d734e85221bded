"""A conversion that is killed, joined, refused or out of room: what appears is whole, and the same to the byte."""

import contextlib
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

from data.commit import sync
from minimax_train.checkpoint.manifest import damage
from minimax_train.checkpoint.record import Progress, Record
from minimax_train.checkpoint.store import save
from minimax_train.convert import work
from minimax_train.convert.from_hf import from_hf
from minimax_train.convert.to_hf import to_hf
from minimax_train.convert.work import conversion
from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.engine.state import model_state
from tests.support import FIXTURE, little_model

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
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(process.pid or 0, process.pid or 0)  # here too: whoever is first
    return process


def _alone(convert: Convert, source: Path, target: Path) -> None:
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    try:
        convert(source, target)
    except ValueError as error:
        if "already exists" not in str(error):  # it came when another was through
            raise


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
    expected, draw, kills = contents(tmp_path / "undisturbed"), random.Random(3), 0
    target, work_folder = tmp_path / "target", tmp_path / ".partial-target"
    for _ in range(100):
        process = started(convert, source, target)
        while process.is_alive() and not (work_folder / "identity.json").exists():
            time.sleep(0.001)
        if kills < 10:
            time.sleep(draw.uniform(0.0, 0.7) * seconds)
        else:
            process.join()
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
            kills += not target.exists()
        process.join()
        if target.exists():
            with pytest.raises(ValueError, match="already exists"):
                convert(source, target)  # and what is left of a kill right after the rename is gone now
            assert contents(target) == expected
            assert sorted(p.name for p in tmp_path.iterdir()) == ["target", "undisturbed"]
            if kills >= 10:
                break
            shutil.rmtree(target)
    assert kills >= 10 and len(expected) > 15


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
    assert all(process.exitcode == 0 for process in processes)
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
    with pytest.raises(ValueError, match=f"NaN or infinity, as fp32, in 3: {', '.join(bad)}"):
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


def stopped_at(monkeypatch: pytest.MonkeyPatch, where: Callable[[Path], bool], run: Callable[[], Any]) -> None:
    """Stops `run` as a kill would, at the first call of `sync` with a path that `where` picks."""

    def stop(path: Path) -> None:
        if where(path):
            raise KeyboardInterrupt
        sync(path)

    monkeypatch.setattr(work, "sync", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()


def test_stopped_between_the_manifest_and_the_rename(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    stopped_at(monkeypatch, lambda path: path.name == "result", lambda: from_hf(FIXTURE, target, shard_bytes=SMALL))
    assert (tmp_path / ".partial-target" / "result" / "manifest.json").exists()
    incoming(FIXTURE, target)
    assert damage(target) is None
    assert contents(target) == contents(checkpoint)


def test_nothing_is_believed_of_a_folder_without_identity(tmp_path: Path, checkpoint: Path) -> None:
    """What is left where removing it was interrupted: finished work of another model."""
    source, left = tmp_path / "source", tmp_path / ".partial-target"
    shutil.copytree(FIXTURE, source)
    save_file({n: t + 1 for n, t in load_file(FIXTURE / "model.safetensors").items()}, source / "model.safetensors")
    interrupted_after(source, tmp_path / "target", 3)
    (left / "identity.json").unlink()
    incoming(FIXTURE, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(checkpoint)


def interrupted_after(source: Path, target: Path, shards: int) -> None:
    """Leaves a conversion of which some shards are finished."""
    process = started(incoming, source, target)
    done = target.with_name(f".partial-{target.name}") / "done"
    while not (done.exists() and len(list(done.glob("*.json"))) >= shards):
        assert process.is_alive(), "it was through before it could be killed"
        time.sleep(0.001)
    os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not target.exists()


def test_a_finished_shard_that_is_gone_is_done_again(tmp_path: Path, checkpoint: Path) -> None:
    interrupted_after(FIXTURE, tmp_path / "target", 3)
    finished = sorted((tmp_path / ".partial-target" / "done").glob("*.json"))
    (tmp_path / ".partial-target" / "result" / "tensors" / finished[0].stem).unlink()
    (tmp_path / ".partial-target" / "result" / "tensors" / finished[1].stem).write_bytes(b"short")
    incoming(FIXTURE, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(checkpoint)


def test_one_who_comes_too_late_does_nothing(tmp_path: Path) -> None:
    """The target appeared after it was looked for: that is the end of the work, and nothing is left behind."""
    from_hf(FIXTURE, tmp_path / "target")
    late = work.Work(tmp_path / "target")
    with pytest.raises(work.FinishedElsewhereError):
        late.begin({}, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_conversion_that_is_given_up_leaves_its_successor_alone(tmp_path: Path) -> None:
    """A process of the first still runs when the second has begun under the same name: it may neither write nor remove."""
    first, second = work.Work(tmp_path / "target"), work.Work(tmp_path / "target")
    first.begin({"number": 1}, 0)
    first.remove()
    second.begin({"number": 2}, 0)
    job = work.Job(name="job", bytes=1, run=lambda: {"bytes": 1})
    with pytest.raises(ValueError, match="another process gave up"):
        first.do([job], "", workers=1, quiet=True)
    first.give_up()
    assert second.do([job], "", workers=1, quiet=True) == {"job": {"bytes": 1}}
    (tmp_path / "target").mkdir()
    with pytest.raises(work.FinishedElsewhereError):
        second.finish(lambda _: None)


def test_a_resumed_export_looks_again_at_files_that_changed(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks that an interrupted export made hold for the files as they were."""
    copy, target = tmp_path / "checkpoint", tmp_path / "target"
    shutil.copytree(checkpoint, copy)
    stopped_at(monkeypatch, lambda path: path.name == "result", lambda: to_hf(copy, target, "minimax_m1", shard_bytes=SMALL))
    file = next((copy / "tensors").glob("*.distcp"))
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    with pytest.raises(ValueError, match="differs in source"):
        outgoing(copy, target)
    shutil.rmtree(tmp_path / ".partial-target")
    with pytest.raises(ValueError, match=rf"{file.name} was changed: its checksum does not hold"):
        outgoing(copy, target)
    assert not target.exists() and not (tmp_path / ".partial-target").exists()


def test_an_export_with_bad_numbers_is_refused(tmp_path: Path, alone: Session) -> None:
    """A run that went wrong: a checkpoint that is intact and holds NaN."""
    model = bare(build_stage(little_model(), alone, seed=1))
    with torch.no_grad():
        model.blocks["2"].experts.down[1, 3, 4] = float("nan")  # type: ignore[union-attr, operator]
    record = Record(model=little_model(), rope_base=1e4, max_positions=64, precision="fp32", progress=Progress(), optimizer_steps=None)
    save(tmp_path / "ckpt", model_state(model, alone.groups), record, alone.groups)
    with pytest.raises(ValueError, match=r"NaN or infinity, as fp32, in 1: model.layers.2.block_sparse_moe.experts.1.w2.weight"):
        to_hf(tmp_path / "ckpt", tmp_path / "hf", "minimax_m1")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
