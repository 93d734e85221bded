"""One training process at a time in a run's folder; the lock dies with its process, however that ends."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minimax_train.cli import main
from minimax_train.recipe import as_yaml
from minimax_train.train.folder import owned
from tests.support import little_plan

HOLD = "import sys, time; from pathlib import Path; from minimax_train.train.folder import owned\nwith owned(Path(sys.argv[1])):\n"
HOLD += "    print('held', flush=True); time.sleep(600)"


def holder(run: Path) -> "subprocess.Popen[str]":
    """A process that holds the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_refuses(tmp_path: Path) -> None:
    """And takes over what a process left that was killed, as on a node that was lost: no lease has to run out on one machine."""
    process = holder(tmp_path / "run")
    try:
        with pytest.raises(ValueError, match="another process is training in .*/run: wait for it"), owned(tmp_path / "run"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "run" / "lock").exists()
    with owned(tmp_path / "run"):
        pass


def test_on_the_command_line(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two jobs on one run: the second is told in a line, and the first one's files stay."""
    (tmp_path / "little.yaml").write_text(as_yaml(little_plan(corpus)))
    process = holder(tmp_path / "run")
    try:
        assert main(["train", str(tmp_path / "little.yaml"), "--to", str(tmp_path / "run")]) == 2
    finally:
        process.kill()
        process.wait()
    error = capsys.readouterr().err
    assert "another process is training in" in error and error.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_an_old_lock_file(tmp_path: Path) -> None:
    """A file alone locks nothing, whatever stands in it, whenever it was written."""
    (tmp_path / "lock").write_text("pid 1 on a node that is gone")
    os.utime(tmp_path / "lock", (0, 0))
    with owned(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre mounted without `-o flock`, for one: said, not passed over."""

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="not implemented"), owned(tmp_path):
        pass
