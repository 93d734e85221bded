"""Sharded tensors to and from a folder, by megatron-core's dist_checkpointing (`torch_dist`)."""

import shutil
from pathlib import Path
from pickle import UnpicklingError
from queue import Queue

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from minimax_train.engine.state import Sharded
from minimax_train.engine.torch_dist import read_index


def write_tensors(state: Sharded, folder: Path) -> None:
    """Every rank writes its shards into `folder`, which exists and is empty. OSError where the disk refuses.

    megatron-core's writers report through a queue that it would keep in a process of its own (multiprocessing.Manager: 275 MB a rank, and
    it outlives a rank that is killed). We wait for the writers, so a queue in this process does.
    """
    folder.mkdir(exist_ok=True)
    filesystem_async._results_queue = Queue()
    try:
        dist_checkpointing.save(dict(state), str(folder), ("torch_dist", 1))
    except CheckpointException as error:  # what torch makes of whatever its writer processes met, a full disk first of all
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"{reason} ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there: is the disk full?)") from error


@torch.no_grad()
def read_tensors(state: Sharded, folder: Path) -> None:
    """Fills the tensors of `state` in place from a folder whose checksums hold (its metadata is a pickle).

    ValueError where the folder lacks a tensor or has it in another shape, as an earlier version stored optimizer state.
    """
    read_index(folder)  # refuses a pickle that would make anything but a checkpoint's records, before megatron-core loads it
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    for sharded in state.values():
        found = stored[sharded.key].global_shape if sharded.key in stored else None
        if found != sharded.global_shape:
            has = "lacks" if found is None else f"has {list(found)} for"
            raise ValueError(
                f"{folder} {has} {sharded.key}, where this version keeps {list(sharded.global_shape)}; of a checkpoint of another version, "
                "take the weights alone: start a new run with start.checkpoint and start.optimizer=fresh"
            )
    try:
        loaded = dist_checkpointing.load(dict(state), str(folder))
    except (UnpicklingError, CheckpointException) as error:  # of its own files, or what torch makes of any trouble with a chunk
        said = " ".join(str(error).split()).partition("WeightsUnpickler error: ")  # what comes before advises to read it all the same
        raise ValueError(f"{folder} is refused: {(said[2] or said[0]).partition(' Check the documentation')[0][-300:]}") from error
    for name, sharded in state.items():
        if loaded[name].data_ptr() != sharded.data.data_ptr():
            sharded.data.copy_(loaded[name])
