"""Sharded tensors to and from a folder, by megatron-core's dist_checkpointing (`torch_dist`)."""

import shutil
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from minimax_train.engine.state import Sharded


def write_tensors(state: Sharded, folder: Path) -> None:
    """Every rank writes its shards into `folder`, which exists and is empty. OSError where the disk refuses."""
    folder.mkdir(exist_ok=True)
    try:
        dist_checkpointing.save(dict(state), str(folder), ("torch_dist", 1))
    except CheckpointException as error:  # what torch makes of whatever its writer processes met, a full disk first of all
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"{reason} ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there: is the disk full?)") from error


@torch.no_grad()
def read_tensors(state: Sharded, folder: Path) -> None:
    """Fills the tensors of `state` in place from a folder whose checksums hold (its metadata is a pickle)."""
    loaded = dist_checkpointing.load(dict(state), str(folder))
    for name, sharded in state.items():
        if loaded[name].data_ptr() != sharded.data.data_ptr():
            sharded.data.copy_(loaded[name])
