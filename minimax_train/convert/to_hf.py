"""Checkpoint -> Hugging Face, a piece of a tensor at a time, in the released format or transformers' own."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.commit import sync
from minimax_train.checkpoint.commit import replace_text
from minimax_train.checkpoint.manifest import NAME as MANIFEST
from minimax_train.checkpoint.manifest import checksum
from minimax_train.convert import carried
from minimax_train.convert.cast import dtype_of, is_finite
from minimax_train.convert.config import Format, write_config
from minimax_train.convert.from_hf import Parts
from minimax_train.convert.pieces import pieces
from minimax_train.convert.safetensors_file import header_of
from minimax_train.convert.shards import SHARD_BYTES, plan_shards, shard_name
from minimax_train.convert.source import INDEX, some
from minimax_train.convert.stored import StoredModel
from minimax_train.convert.table import table
from minimax_train.convert.work import FinishedElsewhereError, Job, Work, conversion, refuse_existing
from minimax_train.engine.hashed import Hashed
from minimax_train.plan import Precision


def to_hf(
    checkpoint: Path,
    final: Path,
    kind: Format,
    *,
    tokenizer: Path | None = None,
    cast: Precision | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    quiet: bool = True,
) -> None:
    """Writes config.json, the weights in files of about `shard_bytes` with their index, and the files that came
    with the weights to a new folder, complete or not at all.

    Tensors keep the checkpoint's precision unless `cast` names another; routers stay fp32, as released. ValueError where the format cannot
    express the model, or the checkpoint is damaged or holds NaN or infinity.
    """
    refuse_existing(final)
    model = StoredModel.open(checkpoint)
    record, precision = model.record, cast or model.record.precision
    travelled, origin = carried.origin(checkpoint)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    config = write_config(record.model, record.rope_base, kind, dtype, record.max_positions, origin)
    parts = [(entry, part) for entry in table(record.model) for part in entry.parts]
    sizes = [math.prod(part.shape) * dtype_of(entry, precision).itemsize for entry, part in parts]
    runs = plan_shards(sizes, shard_bytes)
    identity = {
        "manifest": checksum(checkpoint / MANIFEST),
        "source": model.times(),
        "precision": precision,
        "format": kind,
        "files": len(runs),
    }
    try:
        with conversion(final, identity, sum(sizes)) as work:
            work.do(model.checks(), "verifying", workers=workers, quiet=quiet)
            jobs: list[Job] = []
            where: dict[str, str] = {}
            for number, run in enumerate(runs):
                name, held = shard_name(number, len(runs)), parts[run.start : run.stop]
                where |= {part.name: name for _, part in held}
                shard = _Shard(model, precision, work, name)
                jobs.append(Job(name=name, bytes=sum(sizes[run.start : run.stop]), run=partial(shard.write, held), file=shard.path))
            work.do(jobs, "converting", workers=workers, quiet=quiet)

            def complete(result: Path) -> None:
                if travelled is not None and origin is not None:
                    carried.carry_out(travelled, origin, kind, result)
                if tokenizer is not None:
                    shutil.copyfile(tokenizer, result / "tokenizer.json")
                    sync(result / "tokenizer.json")
                if len(runs) > 1:
                    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
                    replace_text(result / INDEX, json.dumps(index, indent=2) + "\n")
                replace_text(result / carried.CONFIG, json.dumps(config, indent=2) + "\n")

            work.finish(complete)
    except FinishedElsewhereError:
        return


class _Shard:
    """One file of the export, and the job that writes it."""

    def __init__(self, model: StoredModel, precision: Precision, work: Work, name: str) -> None:
        self.model, self.precision, self.name = model, precision, name
        self.path = work.result / name

    def write(self, parts: Parts) -> dict[str, Any]:
        """Writes the file and forces it to the disk. ValueError listing tensors with NaN or infinity."""
        unfinished = self.path.with_name(f"{self.name}.partial")
        header = header_of([(part.name, dtype_of(entry, self.precision), part.shape) for entry, part in parts])
        bad: list[str] = []
        try:
            with Hashed(unfinished) as file, self.model.reader() as reader:
                file.write(header)
                for entry, part in parts:
                    dtype = dtype_of(entry, self.precision)
                    widest = max(dtype.itemsize, dtype_of(entry, self.model.record.precision).itemsize)
                    for piece in pieces(entry, part, widest):
                        numbers = reader.piece(entry, piece).to(dtype)
                        if not is_finite(numbers):
                            bad.append(part.name)
                            break
                        file.write(numbers.view(torch.uint8).numpy())
            if bad:
                raise ValueError(f"{self.model.folder}: NaN or infinity, as {self.precision}, in {some(bad)}: refused")
            unfinished.rename(self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        return {"bytes": file.size}
