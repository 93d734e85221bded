"""Ranks talk before work begins: real gloo ranks, one of which sends wrong bytes, adds wrong numbers, or stops."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimax_train.cli import main

SOUND = "from minimax_train.cli import main; raise SystemExit(main())"
WRONG_BYTES = "import parallel.smoke as s; s.content = lambda rank, *a, right=s.content: right(rank, *a) + (rank == 1); " + SOUND
WRONG_SUMS = "import parallel.smoke as s; s.contribution = lambda rank: 7; " + SOUND
STOPPED = "import os, signal, parallel.smoke as s; s._ring = lambda *a: os.kill(os.getpid(), signal.SIGSTOP); " + SOUND


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def talk(folder: Path, programs: list[str], seconds: float = 60) -> list[int]:
    """Exit status of each rank; a rank that is stopped gets SIGKILL when the others have ended. Two ranks a node: n0, n0, n1, ..."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank, program in enumerate(programs):
        place = {"RANK": str(rank), "WORLD_SIZE": str(len(programs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, **place, "SLURMD_NODENAME": f"n{rank // 2}", "GLOO_SOCKET_IFNAME": "lo"}
        words = ["doctor", "--collectives", str(folder), "--seconds", str(seconds), "--device", "cpu"]
        ranks.append(subprocess.Popen([sys.executable, "-c", program, *words], env=environment, start_new_session=True))
    try:
        for rank, program in zip(ranks, programs, strict=True):
            if "SIGSTOP" not in program:
                rank.wait(120)
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
    return [rank.wait() for rank in ranks]


def said(folder: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted(folder.iterdir())}


def test_all_is_well(folder: Path) -> None:
    """Three ranks on two nodes; each tells the bandwidth of every size."""
    assert talk(folder, [SOUND] * 3) == [0, 0, 0]
    lines = said(folder)
    assert list(lines) == ["n0.0.collectives", "n0.1.collectives", "n1.2.collectives"]
    for rank, text in enumerate(lines.values()):
        assert text[0] == f"rank {rank} of 3 on n{rank // 2}" and text[-1] == "good"
        assert [line.split(":")[0] for line in text[1:-1]] == [
            f"{what} of {size} bytes" for size in ("4,096", "1,048,576", "8,388,608") for what in ("all-reduce", "ring")
        ]
        assert all(float(line.split()[-2]) > 0 for line in text[1:-1])


def test_wrong_bytes(folder: Path) -> None:
    """Only the neighbour can know, and it names the sender; everybody gets to the end."""
    assert talk(folder, [SOUND, WRONG_BYTES, SOUND]) == [0, 0, 1]
    assert said(folder)["n1.2.collectives"][-1].startswith("wrong: rank 2 on n1: ring of 4,096 bytes: ")
    assert "bytes from rank 1 are wrong" in said(folder)["n1.2.collectives"][-1]


def test_wrong_sums(folder: Path) -> None:
    """Everybody sees it."""
    assert talk(folder, [WRONG_SUMS, SOUND]) == [1, 1]
    assert all("1,024 of 1,024 sums are wrong" in text[-1] for text in said(folder).values())


def test_a_rank_that_stops(folder: Path) -> None:
    """SIGSTOP in the middle: the others end by themselves and say what they waited for; the one that says no more is the one."""
    begin = time.monotonic()
    assert talk(folder, [SOUND, STOPPED, SOUND], seconds=20) == [1, -signal.SIGKILL, 1]
    assert time.monotonic() - begin < 60
    lines = said(folder)
    assert "nothing came within 20 s, after all-reduce of 4,096 bytes" in lines["n0.0.collectives"][-1]
    assert lines["n0.1.collectives"][-1].startswith("all-reduce")
    assert lines["n1.2.collectives"][-1].startswith("wrong: rank 2 on n1")


def test_a_rank_that_does_not_come(folder: Path) -> None:
    assert talk(folder, [SOUND, STOPPED.replace("s._ring = lambda *a:", "")], seconds=10) == [1, -signal.SIGKILL]
    assert "waiting for the other ranks to come" in said(folder)["n0.0.collectives"][-1]


def test_alone_and_too_slow(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One rank hears itself; a bound that nothing reaches is one only where there are several."""
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "--collectives", str(folder), "--device", "cpu", "--least", "1e9"]) == 0
    assert "all-reduce of 8,388,608 bytes" in capsys.readouterr().err
    assert main(["doctor", "--collectives", str(folder), "--seconds", "0"]) == 2
    assert "--seconds is 0.0" in capsys.readouterr().err
