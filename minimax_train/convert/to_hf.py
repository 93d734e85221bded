"""Checkpoint -> Hugging Face, in the released format or transformers' own."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from data.commit import sync
from minimax_train.checkpoint.commit import abandon, begin
from minimax_train.checkpoint.shelf import verified_record
from minimax_train.checkpoint.store import load_weights
from minimax_train.convert.config import Format, write_config
from minimax_train.convert.table import table
from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage


def to_hf(checkpoint: Path, final: Path, kind: Format, session: Session, *, tokenizer: Path | None = None) -> None:
    """Writes config.json and model.safetensors (and the tokenizer's file) to a new folder, complete or not at all.

    Tensors keep the checkpoint's precision; routers stay fp32, as released.
    """
    record = verified_record(checkpoint)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[record.precision]
    config = write_config(record.model, record.rope_base, kind, dtype, record.max_positions)
    stage = build_stage(record.model, session, dtype=record.precision, seed=None)
    load_weights(bare(stage), checkpoint, record, session.groups)
    parameters = dict(bare(stage).named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    for entry in table(record.model):
        tensors |= entry.split(parameters[entry.name].detach())
    folder = begin(final)
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / "tokenizer.json")
        for path in folder.iterdir():
            sync(path)
        folder.rename(final)
    except BaseException:
        abandon(folder)
        raise
