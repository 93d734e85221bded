"""Tensors of a checkpoint: all ranks save them, each loads what it needs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minimax_train.checkpoint.commit import abandon, begin, commit
from minimax_train.checkpoint.record import Record, write_record
from minimax_train.checkpoint.shelf import TENSORS
from minimax_train.engine.state import Sharded, model_state
from minimax_train.engine.storage import read_tensors, write_tensors
from parallel.collectives import first_does, raise_together
from parallel.groups import Groups


def save(final: Path, state: Sharded, record: Record, groups: Groups) -> None:
    """All ranks write `state`; it appears at `final` complete or not at all. OSError on every rank where any rank's disk refuses."""
    folder = first_does(lambda: begin(final), groups.world)
    try:
        raise_together(_attempt(lambda: write_tensors(state, folder / TENSORS)), groups.world)
        first_does(lambda: _finish(folder, final, record), groups.world)
    except OSError as failure:
        raise OSError(f"checkpoint {final} was not written: {failure}") from failure
    finally:
        if groups.rank == 0:
            abandon(folder)  # nothing is there any more once it was committed


def _attempt(work: Callable[[], None]) -> OSError | None:
    try:
        work()
    except OSError as error:
        return error
    return None


def _finish(folder: Path, final: Path, record: Record) -> None:
    write_record(folder, record)
    commit(folder, final)


def load_weights(decoder: nn.Module, checkpoint: Path, record: Record, groups: Groups) -> None:
    """Fills the model from a verified checkpoint of its architecture, casting where the precisions differ."""
    state = model_state(decoder, groups)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[record.precision]
    targets: dict[str, Tensor] = {name: sharded.data for name, sharded in state.items()}
    buffers = {
        name: replace(sharded, data=torch.empty_like(sharded.data, dtype=stored), dtype=stored)
        if _is_cast(name) and sharded.dtype != stored
        else sharded
        for name, sharded in state.items()
    }
    read_tensors(buffers, checkpoint / TENSORS)
    for name, target in targets.items():
        if buffers[name].data is not target:
            target.copy_(buffers[name].data)


def _is_cast(name: str) -> bool:
    """Whether a weight takes the model's precision; routers are fp32 in every checkpoint."""
    return not name.endswith("router.weight")
