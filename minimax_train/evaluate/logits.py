"""Forward only: token ids in, logits out, from a checkpoint."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimax_train.checkpoint.record import Record
from minimax_train.checkpoint.store import load_weights
from minimax_train.checkpoint.verify import open_shared
from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.model.decoder import Decoder
from minimax_train.model.row import Row
from minimax_train.plan import Precision


def load_decoder(path: Path, session: Session, precision: Precision | None = None) -> tuple[Decoder, Record]:
    """The model of a checkpoint, or of a run's newest that verifies, in its own precision or another, at the RoPE base it was trained
    with. All ranks call it."""
    checkpoint, record = open_shared(path, session.groups)
    return fill_decoder(checkpoint, record, session, precision), record


def fill_decoder(checkpoint: Path, record: Record, session: Session, precision: Precision | None = None) -> Decoder:
    """The same, of a checkpoint known to be undamaged: all its layers, of which this rank has its part under the session's layout."""
    stage = build_stage(record.model, session, dtype=precision or record.precision, seed=None, rope_base=record.rope_base)
    decoder = bare(stage).eval()
    load_weights(decoder, checkpoint, record, session.groups)
    return decoder


def read_input_ids(path: Path, vocabulary: int) -> Tensor:
    """`input_ids` `[B, T]` (or `[T]`) of integers in [0, vocabulary), as int64 `[B, T]`; ValueError otherwise."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if "input_ids" not in tensors:
        raise ValueError(f"{path} has no tensor `input_ids`; it has {', '.join(tensors) or 'none'}")
    ids = torch.atleast_2d(tensors["input_ids"])
    if ids.is_floating_point() or ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"{path}: input_ids has dtype {ids.dtype} and shape {list(ids.shape)}; integers [batch, tokens] are needed")
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(f"{path}: input_ids range from {lowest} to {highest}; the model's vocabulary allows 0 to {vocabulary - 1}")
    return ids.long()


@torch.no_grad()
def batch_logits(decoder: Decoder, ids_BT: Tensor) -> Tensor:
    """`[B, T]` -> `[B, T, vocabulary]`; every row is one document."""
    device = next(decoder.parameters()).device
    return torch.stack([decoder.logits(Row.of_documents([ids]).to(device)) for ids in ids_BT])


def write_logits(checkpoint: Path, input_ids: Path, final: Path, session: Session, precision: Precision | None) -> list[int]:
    """Reads `input_ids` from one file, writes `logits` to another, and returns their shape. ValueError where `final` exists."""
    if final.exists():
        raise ValueError(f"{final} already exists: remove it or choose another file")
    if not final.parent.is_dir():
        raise ValueError(f"{final.parent} is not a folder: choose another --to")
    decoder, record = load_decoder(checkpoint, session, precision)
    logits = batch_logits(decoder, read_input_ids(input_ids, record.model.vocab_size)).cpu().contiguous()
    temporary = final.with_name(final.name + ".partial")
    try:
        save_file({"logits": logits}, temporary)
        temporary.rename(final)
    finally:
        temporary.unlink(missing_ok=True)
    return list(logits.shape)
