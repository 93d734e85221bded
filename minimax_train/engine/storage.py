"""Sharded tensors to and from a folder, by megatron-core's dist_checkpointing (`torch_dist`)."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from minimax_train.engine.state import Sharded


def write_tensors(state: Sharded, folder: Path) -> None:
    """Every rank writes its shards into `folder`, which exists and is empty. OSError where the disk refuses."""
    folder.mkdir(exist_ok=True)
    try:
        dist_checkpointing.save(dict(state), str(folder), ("torch_dist", 1), content_metadata={"distrib_optim_sharding_type": "flat_names"})
    except OSError:
        raise
    except Exception as error:  # torch wraps what its writer processes met
        cause = _operating_system_error(error)
        if cause is None:
            raise
        raise OSError(cause) from error


@torch.no_grad()
def read_tensors(state: Sharded, folder: Path) -> None:
    """Fills the tensors of `state` in place from a folder whose checksums hold (its metadata is a pickle)."""
    loaded = dist_checkpointing.load(dict(state), str(folder))
    for name, sharded in state.items():
        if loaded[name].data_ptr() != sharded.data.data_ptr():
            sharded.data.copy_(loaded[name])


def _operating_system_error(error: BaseException) -> str | None:
    """The text of the OSError behind `error`, if one is."""
    seen, pending = set(), [error]
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError):
            return str(current)
        if "[Errno" in str(current) and not isinstance(current, KeyError):
            return str(current)[str(current).index("[Errno") :].split("\n")[0]
        pending += [e for e in (current.__cause__, current.__context__) if e is not None]
        pending += [f for f in getattr(current, "failures", {}).values() for f in (f[0] if isinstance(f, tuple) else f,)]
    return None
