"""What is looked at on a node before ranks are started on it; the job's script reads what every node writes."""

import hashlib
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SOON = 60
"""Seconds that nvidia-smi may take: on a sick driver it hangs."""
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
    """Number of GPUs, uncorrected memory errors, pages that wait for a reset; as nvidia-smi tells."""
    asked = "--query-gpu=index,ecc.errors.uncorrected.volatile.total,retired_pages.pending"
    try:
        done = subprocess.run(["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, text=True, timeout=SOON)
    except FileNotFoundError:
        return [f"{wanted} GPUs wanted, and there is no nvidia-smi"]
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi did not answer within {SOON} s"]
    if done.returncode:
        return [f"nvidia-smi: {' '.join((done.stderr or done.stdout).split())}"]
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    wrong = [] if len(rows) == wanted else [f"{len(rows)} GPUs, {wanted} wanted"]
    wrong += [f"GPU {row[0]}: {row[1]} uncorrected memory errors" for row in rows if row[1].isdigit() and int(row[1])]
    return wrong + [f"GPU {row[0]}: retired pages wait for a reset" for row in rows if row[2].lower() == "yes"]
