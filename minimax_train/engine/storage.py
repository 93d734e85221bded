"""Sharded tensors to and from a folder, by megatron-core's dist_checkpointing (`torch_dist`)."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from minimax_train.engine.state import Sharded
from minimax_train.engine.torch_dist import read_index


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
