"""What a node says of itself before ranks start on it."""

from pathlib import Path

import pytest

from minimax_train.cli import main
from minimax_train.preflight import check_node, fatal_events, held_down, versions


def test_a_good_node(tmp_path: Path) -> None:
    assert check_node(tmp_path, "n1", gpus=0, space=tmp_path, free_gib=0) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n1.good", "n1.versions"]
    assert (tmp_path / "n1.versions").read_text() == versions() + "\n"
    assert "torch 2." in versions() and "code " in versions()


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line, which ends well: the job's script reads the files of all nodes."""
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert main(["doctor", "--node", str(tmp_path), "--space", str(tmp_path), "--free-gib", "1000000"]) == 0
    assert "1000000 wanted" in (tmp_path / "n7.bad").read_text() and not (tmp_path / "n7.good").exists()
    assert "preflight: n7:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("0, 0, No\n1, 0, No\n", []),
        ("0, 0, No\n", ["1 GPUs, 2 wanted"]),
        ("0, 0, No\n1, 3, No\n", ["GPU 1: 3 uncorrected memory errors"]),
        ("0, [N/A], [N/A]\n1, 0, Yes\n", ["GPU 1: retired pages wait for a reset"]),
    ],
)
def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, wrong: list[str]) -> None:
    """What nvidia-smi says, said by a stand-in, for there is none here."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ncase $1 in *clocks*) exit 6;; esac\nprintf '%s' '{said}'\n")  # an old driver: no such question
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    assert check_node(tmp_path, "n1", gpus=2, space=tmp_path, free_gib=0) == wrong


def test_gpus_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_node(tmp_path, "n1", gpus=8, space=tmp_path, free_gib=0) == ["8 GPUs wanted, and there is no nvidia-smi"]
    assert (tmp_path / "n1.bad").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Nothing is written then, which the job's script takes for no answer."""
    with pytest.raises(OSError, match="missing"):
        check_node(tmp_path / "missing", "n1", gpus=0, space=tmp_path, free_gib=0)


CLOCKS = """\
0, Not Active, Not Active, Not Active
1, Active, Active, Not Active
2, [N/A], [N/A], [N/A]
3, Not Active, Not Active, Active
"""
"""An example, written after nvidia-smi's documentation; recorded on no machine of ours."""


def test_clocks() -> None:
    assert held_down(CLOCKS) == [
        "GPU 1: clocks held down: hw slowdown",
        "GPU 1: clocks held down: hw thermal slowdown",
        "GPU 3: clocks held down: hw power brake slowdown",
    ]
    assert held_down("") == held_down("Field is not a valid field to query.") == []


LOG = """\
[    1.000000] Linux version 6.8.0
[  100.500000] NVRM: Xid (PCI:0000:1b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 9000.250000] NVRM: Xid (PCI:0000:3b:00): 31, pid=4242, name=python, Ch 00000008, MMU Fault: ENGINE GRAPHICS
[ 9000.500000] NVRM: Xid (PCI:0000:3b:00): 74, pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link 3
[ 9000.600000] NVRM: Xid (PCI:0000:3b:00): 74, pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link 3
[ 9001.000000] python[4242]: says NVRM: Xid (PCI:0000:5e:00): 79, which is no line of the driver's
"""
"""An example, written after NVIDIA's list of XIDs; recorded on no machine of ours."""


def test_fatal_events() -> None:
    """The machine's of the last hour, once each; not a program's own fault, not an old one."""
    assert fatal_events(LOG, 9100.0) == ["GPU at 0000:3b:00: XID 74: NVLink error"]
    assert fatal_events(LOG, 200.0)[0] == "GPU at 0000:1b:00: XID 79: fallen off the bus"
    assert fatal_events("", 1.0) == []
