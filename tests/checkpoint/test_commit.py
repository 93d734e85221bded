"""The commit protocol and the manifest: complete or absent, and damage is always seen."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimax_train.checkpoint.commit import begin, committed, remove_leftovers
from minimax_train.checkpoint.manifest import damage


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A committed folder of a few small files."""
    final = tmp_path / "step-00000001"
    with committed(final) as folder:
        (folder / "tensors").mkdir()
        (folder / "tensors" / "a.distcp").write_bytes(bytes(range(256)))
        (folder / "tensors" / ".metadata").write_bytes(b"pickled")
        (folder / "checkpoint.json").write_text("{}")
    return final


def test_committed_is_intact_and_never_written_again(checkpoint: Path) -> None:
    assert damage(checkpoint) is None
    with pytest.raises(ValueError, match="already exists"), committed(checkpoint):
        pass


def test_every_flipped_byte_of_every_file_is_seen(checkpoint: Path) -> None:
    tried = 0
    for path in [p for p in checkpoint.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        for position in range(len(content)):
            path.write_bytes(content[:position] + bytes([content[position] ^ (1 << position % 8)]) + content[position + 1 :])
            assert damage(checkpoint) is not None, (path, position)
            tried += 1
        path.write_bytes(content)
    assert tried > 600
    assert damage(checkpoint) is None


def test_missing_extra_cut_longer_and_linked_files_are_named(checkpoint: Path, tmp_path: Path) -> None:
    victim = checkpoint / "tensors" / "a.distcp"
    content = victim.read_bytes()
    for change, word in (
        (lambda: victim.unlink(), "is missing"),
        (lambda: victim.write_bytes(content[:-1]), "255 bytes, not 256"),
        (lambda: victim.write_bytes(content + b"x"), "257 bytes, not 256"),
        (lambda: victim.write_bytes(bytes(256)), "was changed"),
    ):
        change()
        assert f"tensors/a.distcp {word}" in str(damage(checkpoint)).replace("has ", "")
        victim.write_bytes(content)
    (checkpoint / "stray").touch()
    assert damage(checkpoint) == "stray does not belong there"
    (checkpoint / "stray").unlink()
    outside = tmp_path / "outside"
    outside.write_bytes(content)
    victim.unlink()
    victim.symlink_to(outside)
    assert "not a plain file" in str(damage(checkpoint))


def test_a_manifest_of_another_format_or_body_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["checkpoint.json"]["bytes"] = 3
    path.write_text(json.dumps(manifest))
    assert damage(checkpoint) == "manifest.json was changed"
    path.write_text("{")
    assert damage(checkpoint) == "manifest.json cannot be read"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), committed(tmp_path / "x") as folder:
        (folder / "half").touch()
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, time
from pathlib import Path
from minimax_train.checkpoint.commit import committed
n = 0
while True:
    n += 1
    with committed(Path(sys.argv[1]) / f"step-{n:08d}") as folder:
        for part in range(20):
            (folder / f"part-{part}").write_bytes(bytes([part]) * 50_000)
"""


@pytest.mark.parametrize("seconds", [0.05, 0.13, 0.31])
def test_sigkill_leaves_only_whole_checkpoints(tmp_path: Path, seconds: float) -> None:
    """What has a final name verifies; what does not is swept away."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = sorted(tmp_path.glob("step-*"))
    assert whole
    assert all(damage(path) is None for path in whole)
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == whole


class _Marker:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled_before_its_checksum_holds(tmp_path: Path) -> None:
    """A checkpoint whose pickled metadata was replaced is refused, and the pickle never runs."""
    from minimax_train.cli import main
    from tests.support import FIXTURE

    assert main(["convert", "from-hf", str(FIXTURE), "--to", str(tmp_path / "ckpt")]) == 0
    marker = tmp_path / "executed"
    (tmp_path / "ckpt" / "tensors" / ".metadata").write_bytes(pickle.dumps(_Marker(marker)))
    assert main(["convert", "to-hf", str(tmp_path / "ckpt"), "--to", str(tmp_path / "hf")]) == 2
    assert not marker.exists()
    assert not (tmp_path / "hf").exists()


def test_leftovers_have_a_name_of_their_own(tmp_path: Path) -> None:
    folder = begin(tmp_path / "step-00000001")
    assert folder.name.startswith(".partial-step-00000001-")
    assert remove_leftovers(tmp_path) == [folder]
