"""What is looked at on a node before ranks are started on it; the job's script reads what every node writes."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SOON = 60
"""Seconds that nvidia-smi may take: on a sick driver it hangs."""
HELD_DOWN = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
"""Reasons of nvidia-smi's that a healthy GPU does not have, idle or not; caps of power and of software come with work."""
XID = re.compile(r"^\[ *(?P<seconds>\d+\.\d+)\] NVRM: Xid \(PCI:(?P<gpu>[0-9a-fA-F:.]+)\): (?P<xid>\d+)\b", re.MULTILINE)
FATAL = {
    48: "uncorrectable memory error",
    64: "row remapping failed",
    74: "NVLink error",
    79: "fallen off the bus",
    95: "uncontained memory error",
    119: "its system processor does not answer",
    120: "its system processor failed",
}
"""XIDs that NVIDIA's list blames on the machine, not on a program, and that want a reset."""
RECENT = 3600.0
PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine")


def check_node(folder: Path, node: str, *, gpus: int, space: Path, free_gib: int) -> list[str]:
    """Looks at this node and writes NODE.good or NODE.bad, and NODE.versions, into the shared `folder`; returns what is wrong."""
    wrong = [*_disk(space, free_gib), *_shared(folder, node), *(_gpus(gpus) if gpus else [])]
    (folder / f"{node}.versions").write_text(versions() + "\n")
    temporary = folder / f".{node}"
    temporary.write_text("; ".join(wrong) + "\n")
    temporary.rename(folder / f"{node}.{'bad' if wrong else 'good'}")
    return wrong


def versions() -> str:
    """What must be equal on all nodes, in one line: interpreter, packages, and this code."""
    said = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            said.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*said, f"code {_fingerprint(Path(__file__).resolve().parent)}"])


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _disk(space: Path, free_gib: int) -> list[str]:
    free = shutil.disk_usage(space).free / 2**30
    return [f"{free:.1f} GiB free at {space}, {free_gib} wanted"] if free < free_gib else []


def _shared(folder: Path, node: str) -> list[str]:
    """What is written can be read back, and the clock agrees with the file server's to a minute."""
    probe = folder / f".probe-{node}"
    try:
        content = os.urandom(1 << 16)
        probe.write_bytes(content)
        wrong = [] if probe.read_bytes() == content else [f"{folder} gives back other bytes than were written"]
        skew = abs(probe.stat().st_mtime - time.time())
        probe.unlink()
    except OSError as error:
        return [f"{folder} cannot be written: {error}"]
    return [*wrong, *([f"the clock is {skew:.0f} s from the file system's"] if skew > 60 else [])]


def _gpus(wanted: int) -> list[str]:
    """Number of GPUs, uncorrected memory errors, pages that wait for a reset, clocks held down by the hardware, and fatal events; as
    nvidia-smi and the kernel's log tell."""
    asked = "--query-gpu=index,ecc.errors.uncorrected.volatile.total,retired_pages.pending"
    try:
        done = _said("nvidia-smi", asked, "--format=csv,noheader")
    except FileNotFoundError:
        return [f"{wanted} GPUs wanted, and there is no nvidia-smi"]
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi did not answer within {SOON} s"]
    if done.returncode:
        return [f"nvidia-smi: {' '.join((done.stderr or done.stdout).split())}"]
    rows = _rows(done.stdout)
    wrong = [] if len(rows) == wanted else [f"{len(rows)} GPUs, {wanted} wanted"]
    wrong += [f"GPU {row[0]}: {row[1]} uncorrected memory errors" for row in rows if row[1].isdigit() and int(row[1])]
    wrong += [f"GPU {row[0]}: retired pages wait for a reset" for row in rows if row[2].lower() == "yes"]
    return [*wrong, *_clocks(), *_events()]


def _clocks() -> list[str]:
    """Nothing where the driver does not know the question: drivers rename these fields."""
    asked = ",".join(["index", *(f"clocks_throttle_reasons.{reason}" for reason in HELD_DOWN)])
    with suppress(subprocess.TimeoutExpired):
        done = _said("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")
        return held_down(done.stdout) if not done.returncode else []
    return [f"nvidia-smi did not answer within {SOON} s"]


def held_down(text: str) -> list[str]:
    """Of nvidia-smi's answer, index and HELD_DOWN of every GPU: whose clocks the hardware holds down, and why."""
    return [
        f"GPU {row[0]}: clocks held down: {reason.replace('_', ' ')}"
        for row in _rows(text)
        for reason, said in zip(HELD_DOWN, row[1:], strict=False)
        if said.lower() == "active"
    ]


def _events() -> list[str]:
    """Nothing where this user may not read the kernel's log."""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = _said("dmesg")
        if not done.returncode:
            return fatal_events(done.stdout, time.clock_gettime(time.CLOCK_BOOTTIME))
    return []


def fatal_events(text: str, now: float) -> list[str]:
    """Of the kernel's log, whose lines begin with seconds since the start: the driver's fatal XIDs of the last hour before `now`."""
    found: dict[tuple[str, int], None] = {}
    for match in XID.finditer(text):
        if int(match["xid"]) in FATAL and now - float(match["seconds"]) < RECENT:
            found[match["gpu"], int(match["xid"])] = None
    return [f"GPU at {gpu}: XID {xid}: {FATAL[xid]}" for gpu, xid in found]


def _rows(text: str) -> list[list[str]]:
    """Cells of lines of comma-separated values."""
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]


def _said(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SOON, stdin=subprocess.DEVNULL)
