"""Hugging Face -> checkpoint: every tensor accounted for, nothing executed, nothing read outside the folder."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minimax_train.checkpoint.record import Progress, Record
from minimax_train.checkpoint.store import save
from minimax_train.convert.config import Described, read_config
from minimax_train.convert.table import DECAY_BUFFERS, Entry, table
from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.engine.state import model_state
from minimax_train.model.decoder import Decoder
from minimax_train.plan import Precision

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def describe(folder: Path) -> Described:
    """What the folder's config.json says."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: give a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, not an object")
    return read_config(raw, str(path))


def from_hf(folder: Path, final: Path, session: Session) -> Record:
    """Writes the folder's weights as a checkpoint at `final`, in their own precision (fp32 or bf16; routers fp32)."""
    described = describe(folder)
    with ExitStack() as stack:
        files = _open(folder, stack)
        entries = table(described.model)
        _account(folder, files, entries)
        precision = _precision(files, entries)
        stage = build_stage(described.model, session, dtype=precision, seed=None)
        _fill(bare(stage), entries, lambda name: files[name].get_tensor(name))
    record = Record(
        model=described.model,
        rope_base=described.rope_base,
        max_positions=described.max_positions,
        precision=precision,
        progress=Progress(),
        optimizer_steps=None,
    )
    save(final, model_state(bare(stage), session.groups), record, session.groups)
    return record


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    root = folder.resolve()
    index = folder / INDEX
    listed: dict[str, str] | None = None
    if index.is_file():
        try:
            listed = json.loads(index.read_text())["weight_map"]
            names = sorted(set(listed.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is not an index of safetensors files") from None
    else:
        names = [WEIGHTS]
        if not (folder / WEIGHTS).is_file():
            pickled = ", ".join(sorted(p.name for p in folder.glob("*.bin"))[:3])
            raise ValueError(f"{folder} has neither {INDEX} nor {WEIGHTS}{f' (pickled {pickled} are never read)' if pickled else ''}")
    where: dict[str, Any] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or path.resolve().parent != root:
            raise ValueError(f"{index if listed else folder}: {name!r} lies outside the folder: refused")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        twice = sorted(set(keys) & where.keys())
        if twice:
            raise ValueError(f"{path}: {twice[0]} is in another file too")
        where |= dict.fromkeys(keys, file)
    if listed is not None and (odd := sorted(set(listed) ^ set(where))):
        raise ValueError(f"{index} and the files disagree about {len(odd)} tensors, the first {odd[0]}")
    return where


def _account(folder: Path, files: dict[str, Any], entries: list[Entry]) -> None:
    """Every tensor is wanted, every wanted one is there, with its shape."""
    wanted = {name: shape for entry in entries for name, shape in entry.parts}
    present = {name for name in files if not name.endswith(DECAY_BUFFERS)}
    for problem, names in (("lacks", sorted(wanted.keys() - present)), ("has unknown", sorted(present - wanted.keys()))):
        if names:
            raise ValueError(f"{folder} {problem} {len(names)} tensors: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
    for name, shape in wanted.items():
        found = tuple(files[name].get_slice(name).get_shape())
        if found != shape:
            raise ValueError(f"{folder}: {name} has shape {list(found)}; the configuration asks for {list(shape)}")


def _precision(files: dict[str, Any], entries: list[Entry]) -> Precision:
    """The one dtype of all weights but routers."""
    found = {files[name].get_slice(name).get_dtype(): name for entry in entries if not entry.fp32 for name, _ in entry.parts}
    known: dict[str, Precision] = {"F32": "fp32", "BF16": "bf16"}
    if len(found) > 1 or not found.keys() <= known.keys():
        listed = "; ".join(f"{dtype} ({name})" for dtype, name in found.items())
        raise ValueError(f"weights are {listed}; all of them must be F32 or all BF16 (routers may be F32)")
    return known[next(iter(found))]


@torch.no_grad()
def _fill(decoder: Decoder, entries: list[Entry], read: Callable[[str], Tensor]) -> None:
    parameters = dict(decoder.named_parameters())
    assert parameters.keys() == {entry.name for entry in entries}
    for entry in entries:
        tensor = entry.join(read)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{entry.parts[0][0]} holds NaN or infinity: refused")
        parameters[entry.name].copy_(tensor)
