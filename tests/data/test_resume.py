"""A run that is killed, at any moment, is gone on with: the files are those of an undisturbed run, whatever the number of workers."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data import shard
from data.dataset import verify
from data.format import file_of
from data.prepare import prepare
from data.shard import write_shard
from data.tokenizer import Tokenizer
from data.workers import each

FORK = multiprocessing.get_context("fork")
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.mkdir", "shutil.copyfile"}
SUFFIXES = (".bin", ".idx", ".tokenizer.json", ".json")


def contents(prefix: Path) -> dict[str, bytes]:
    return {suffix: file_of(prefix, suffix).read_bytes() for suffix in SUFFIXES}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_process(work: Callable[[], Any]) -> int:
    """Exit code of a process of its own."""
    process = FORK.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices, worth several workers."""
    monkeypatch.setattr("data.slices.SLICE", 60)
    monkeypatch.setattr("data.prepare.WORTH_IT", 0)


@pytest.fixture
def packed(folder: Path) -> Path:
    """A compressed file of many slices among the texts."""
    rows = b"".join(json.dumps({"text": f"number {number} of the rows"}).encode() + b"\n" for number in range(9))
    with pa.CompressedOutputStream(pa.OSFile(str(folder / "more.jsonl.zst"), "wb"), "zstd") as file:
        file.write(rows)
    return folder


def make(folder: Path, tokenizer: Tokenizer, prefix: Path, **options: Any) -> None:
    prepare([folder], tokenizer, prefix, **{"quiet": True, "encoder": "reference", **options})


def killed_at(count: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a process that gets SIGKILL just before its `count`-th touch of the file system; False when it ended before."""

    def doomed() -> None:
        left = [count]

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if event in EVENTS:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        work()

    code = in_process(doomed)
    assert code in (0, -signal.SIGKILL)
    return code == -signal.SIGKILL


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_anywhere(packed: Path, tokenizer: Tokenizer, tmp_path: Path, small: None, overwrite: bool) -> None:
    """Every fifth file that is opened, renamed or removed is one point to die at; the next run then dies ten touches later, once more."""
    out = tmp_path / "out"
    prefix = out / "set"

    def again() -> None:
        make(packed, tokenizer, prefix, overwrite=overwrite)

    make(packed, tokenizer, tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    stages = set()
    for count in range(1, 10_000, 5):
        if overwrite:
            (tmp_path / "old.txt").write_text("an older dataset")
            make(tmp_path / "old.txt", tokenizer, prefix)
        if not killed_at(count, again):
            break
        stages.add((len(list(out.glob(".set.partial/*.npz"))) > 0, any(out.glob(".set.partial/set.bin")), file_of(prefix, ".bin").exists()))
        killed_at(10, again)
        again()
        assert contents(prefix) == expected, count
        assert names(out) == sorted(f"set{suffix}" for suffix in SUFFIXES), count
        for suffix in SUFFIXES:
            file_of(prefix, suffix).unlink()
    assert count > 100
    assert {(True, False, overwrite), (True, True, overwrite), (True, False, True)} <= stages  # in the shards, while joining, committing


def test_finished_shards_are_not_done_again(
    packed: Path, tokenizer: Tokenizer, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make(packed, tokenizer, tmp_path / "undisturbed")
    prefix = tmp_path / "out" / "set"

    def die_at_the_sixth(*arguments: Any, **options: Any) -> Any:
        if arguments[1] == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_shard(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.write_shard", die_at_the_sixth)
        assert in_process(lambda: make(packed, tokenizer, prefix)) == -signal.SIGKILL
    room = prefix.with_name(".set.partial")
    damaged, _ = shard.files_of(room, 2)
    content = bytearray(damaged.read_bytes())
    content[0] ^= 1  # as a machine that lost power may leave it
    damaged.write_bytes(content)
    done = []

    def note(*arguments: Any, **options: Any) -> Any:
        done.append(arguments[1])
        return write_shard(*arguments, **options)

    monkeypatch.setattr("data.prepare.write_shard", note)
    make(packed, tokenizer, prefix, quiet=False)
    assert done[:2] == [2, 6] and 5 not in done
    assert "going on after 5 finished shards" in capfd.readouterr().err
    assert contents(prefix) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("encoder", ["reference", "gigatoken"])
def test_any_number_of_workers(packed: Path, tokenizer: Tokenizer, tmp_path: Path, small: None, encoder: str) -> None:
    for workers in (1, 2, 3):
        make(packed, tokenizer, tmp_path / str(workers), workers=workers, encoder=encoder)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    verify(tmp_path / "3")
    assert not list(tmp_path.glob(".*.partial"))


def test_both_encoders_write_the_same_tokens(packed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for encoder in ("reference", "gigatoken"):
        make(packed, tokenizer, tmp_path / encoder, encoder=encoder)
    for suffix in (".bin", ".idx"):
        assert contents(tmp_path / "reference")[suffix] == contents(tmp_path / "gigatoken")[suffix]


@pytest.fixture
def large(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Some 5 MB, so that processes are worth it."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.content)
    with (tmp_path / "large.jsonl").open("w") as file:
        for number in range(5000):
            file.write(json.dumps({"text": f"document {number} " + "".join(chr(97 + (number * i) % 26) for i in range(1000))}) + "\n")
    return tmp_path / "large.jsonl"


SCRIPT = """
import sys
import data.slices
data.slices.SLICE = 100_000
from data.prepare import prepare
from data.tokenizer import load_tokenizer
prepare([sys.argv[1]], load_tokenizer(sys.argv[2]), sys.argv[3], workers=2, encoder="reference")
"""


def test_a_killed_run_of_two_workers(large: Path, tmp_path: Path) -> None:
    """A real run, killed twice; its children end with it."""
    command = [sys.executable, "-c", SCRIPT, str(large), str(tmp_path)]
    room = tmp_path / "out" / ".set.partial"
    for least in (3, 20):
        child = subprocess.Popen([*command, str(tmp_path / "out" / "set")])
        end = time.monotonic() + 120
        while len(list(room.glob("*.npz"))) < least:
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.002)
        child.kill()
        child.wait()
        with (room / "lock").open() as lock:  # held by the children as well, until they notice
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < end
                    time.sleep(0.01)
    done = subprocess.run([*command, str(tmp_path / "out" / "set")], check=True, capture_output=True, text=True)
    assert "going on after" in done.stderr
    subprocess.run([*command, str(tmp_path / "undisturbed")], check=True)
    assert contents(tmp_path / "out" / "set") == contents(tmp_path / "undisturbed")
    assert names(tmp_path / "out") == sorted(f"set{suffix}" for suffix in SUFFIXES)


def test_ctrl_c_keeps_what_is_finished_and_says_so(large: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "out" / "set"
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + SCRIPT
    child = subprocess.Popen([sys.executable, "-c", script, str(large), str(tmp_path), str(prefix)], stderr=subprocess.PIPE, text=True)
    room = prefix.with_name(".set.partial")
    end = time.monotonic() + 120
    while not list(room.glob("*.npz")):
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT
    assert f"{room} keeps what is finished" in error
    assert names(prefix.parent) == [".set.partial"]


def test_two_at_once_are_refused(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    room = tmp_path / "out" / ".set.partial"
    room.mkdir(parents=True)
    with (room / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is preparing"):
            make(folder, tokenizer, tmp_path / "out" / "set")
        assert names(tmp_path / "out") == [".set.partial"]


def test_what_another_call_left_is_thrown_away(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, small: None, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out" / "set"
    assert killed_at(40, lambda: make(folder, tokenizer, prefix))
    assert list(prefix.parent.glob(".set.partial/*.npz"))
    (folder / "0.txt").write_text("changed meanwhile")
    make(folder, tokenizer, prefix, quiet=False)
    assert "left by a run with other inputs; begun anew" in capfd.readouterr().err
    make(folder, tokenizer, tmp_path / "fresh")
    assert contents(prefix) == contents(tmp_path / "fresh")


def test_a_full_disk_leaves_nothing_even_with_workers(
    packed: Path, tokenizer: Tokenizer, tmp_path: Path, small: None, monkeypatch: Any
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        if arguments[1] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(*arguments, **options)

    monkeypatch.setattr("data.prepare.write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        make(packed, tokenizer, tmp_path / "out" / "set", workers=2)
    assert names(tmp_path / "out") == []


def test_a_killed_worker_is_told_and_what_is_finished_stays(
    packed: Path, tokenizer: Tokenizer, tmp_path: Path, small: None, monkeypatch: Any
) -> None:
    def out_of_memory(*arguments: Any, **options: Any) -> Any:
        if arguments[1] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_shard(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.write_shard", out_of_memory)
        with pytest.raises(ChildProcessError, match="a worker process was killed"):
            make(packed, tokenizer, tmp_path / "out" / "set", workers=2)
    assert names(tmp_path / "out") == [".set.partial"]
    make(packed, tokenizer, tmp_path / "out" / "set", workers=2)
    make(packed, tokenizer, tmp_path / "undisturbed")
    assert contents(tmp_path / "out" / "set") == contents(tmp_path / "undisturbed")


def test_jobs_are_made_when_a_worker_is_free() -> None:
    asked: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(20):
            asked.append(number)
            yield number

    results = []
    for value in each(lambda number: number * number, jobs(), workers=3):
        results.append(value)
        assert len(asked) <= len(results) + 3
    assert sorted(results) == [number * number for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(each(lambda number: 1 // number, [3, 2, 1, 0], workers=2))
