"""Files that would run code, in every place from which a checkpoint or a model directory is read."""

import io
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minimax_train.checkpoint.manifest import NAME, write_manifest
from minimax_train.cli import main as command
from minimax_train.engine.torch_dist import read_index
from minimax_train.plan import Plan

FIXTURE = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "minimax_m1_tiny"


class _Calls:
    """A pickle of it calls `function` when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def payloads(marker: Path) -> list[bytes]:
    """Pickles in ten forms; each makes `marker` when an ordinary unpickler reads it."""
    shell, python = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    calls = [_Calls(os.system, shell), _Calls(exec, python), _Calls(eval, python), _Calls(os.mkdir, str(marker)), _Calls(os.popen, shell)]
    by_opcode = [
        f"cos\nsystem\n(S'{shell}'\ntR.".encode(),  # GLOBAL, REDUCE
        f"(S'{shell}'\nios\nsystem\n.".encode(),  # INST
        f"(cos\nsystem\nS'{shell}'\no.".encode(),  # OBJ
    ]
    nested = [pickle.dumps({"state_dict_metadata": {"w": [1, (2, calls[0])]}}), pickle.dumps([calls[1]], protocol=0)]
    return [*(pickle.dumps(call) for call in calls), *by_opcode, *nested]


def hostile(work: Path, plan: Plan, short: bool) -> dict[str, Any]:
    """Ten forms of pickle that run code, as a checkpoint's .metadata, common.pt and tensor files (with checksums that hold: whoever wrote
    the one wrote the other), as a release's pytorch_model.bin, and as its model.safetensors. Verbs that read them are called. Right: no
    code ran, and every verb refused."""
    trials = right = armed = 0
    for number, _ in enumerate(payloads(work)):
        for place in ("metadata", "common", "tensors", "bin", "safetensors"):
            if short and (trials >= 10 or number not in (0, 5)):
                continue
            folder, marker = work / f"{number}-{place}", work / f"marker-{number}-{place}"
            folder.mkdir()
            payload = payloads(marker)[number]
            pickle.loads(payload)  # it does run code where it is let
            armed += marker.exists() or _appears(marker)
            marker.rmdir() if marker.is_dir() else marker.unlink(missing_ok=True)
            verbs = _place(folder, place, payload)
            statuses = [command([*map(str, verb)]) for verb in verbs]
            trials += 1
            right += not marker.exists() and not _appears(marker, 0.05) and all(statuses)
    return {"trials": trials, "right": right if armed == trials else 0, "of which an ordinary unpickler runs": armed}


def _appears(marker: Path, seconds: float = 2.0) -> bool:
    """popen does not wait for its child."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if marker.exists():
            return True
        time.sleep(0.01)
    return False


def _place(folder: Path, place: str, payload: bytes) -> list[list[Any]]:
    """Puts the payload where it would be read, and says with what verbs it is."""
    release, checkpoint, out = folder / "release", folder / "checkpoint", folder / "out"
    shutil.copytree(FIXTURE, release)
    if place in ("bin", "safetensors"):
        (release / "model.safetensors").unlink()
        (release / ("pytorch_model.bin" if place == "bin" else "model.safetensors")).write_bytes(payload)
        return [["convert", "from-hf", release, "--to", checkpoint], ["convert", "verify", release]]
    assert command(["convert", "from-hf", str(release), "--to", str(checkpoint)]) == 0
    tensors = checkpoint / "tensors"
    if place == "metadata":
        (tensors / ".metadata").write_bytes(payload)
    elif place == "common":
        (tensors / "common.pt").write_bytes(_zipped(payload))
    else:
        for tensor in read_index(tensors).values():
            for chunk in tensor.chunks:
                with (tensors / chunk.file).open("r+b") as file:
                    file.seek(chunk.start)
                    file.write(_zipped(payload, chunk.length))
    (checkpoint / NAME).unlink()
    write_manifest(checkpoint)
    save_file({"input_ids": torch.tensor([[1, 2, 3]])}, folder / "ids.safetensors")
    asked = ["generate", checkpoint, "--input-ids", folder / "ids.safetensors", "--tokens", "1"]
    return [["convert", "to-hf", checkpoint, "--to", out], asked] if place != "common" else [asked]


def _zipped(payload: bytes, size: int | None = None) -> bytes:
    """What torch.save makes of something whose pickle is this, of `size` bytes."""
    filling = b""
    while True:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, content in (("data.pkl", payload), ("version", b"3\n"), ("byteorder", b"little"), ("data/0", filling)):
                archive.writestr(f"archive/{name}", content)
        made = file.getvalue()
        if size is None or len(made) == size:
            return made
        assert len(made) < size, "the payload is longer than the tensor"
        filling = bytes(size - len(made))
