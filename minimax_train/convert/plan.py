"""What an export of a model would be: its tensors, files and bytes, from the table alone."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from minimax_train.convert.cast import dtype_of
from minimax_train.convert.config import read_config
from minimax_train.convert.safetensors_file import NAMES
from minimax_train.convert.shards import plan_shards, shard_name
from minimax_train.convert.source import read_json
from minimax_train.convert.table import table
from minimax_train.model.config import ModelConfig, text01, tiny
from minimax_train.plan import Precision
from minimax_train.recipe import load_plan

MODELS = {"text01": text01, "tiny": tiny}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of an export."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Export:
    """Every tensor in the order of the files."""

    model: str
    tensors: list[Tensor]

    @property
    def files(self) -> dict[str, list[Tensor]]:
        """Tensors by file."""
        files: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            files.setdefault(tensor.file, []).append(tensor)
        return files

    def text(self, *, listed: bool, as_json: bool) -> str:
        """For a person or, as JSON, for a script; `listed`: every tensor too."""
        sizes = [sum(tensor.bytes for tensor in held) for held in self.files.values()]
        total, counts = sum(sizes), [len(held) for held in self.files.values()]
        parameters = sum(math.prod(tensor.shape) for tensor in self.tensors)
        if as_json:
            facts = {"tensors": len(self.tensors), "shards": len(sizes), "bytes": total, "parameters": parameters}
            return json.dumps({**facts, **({"list": [asdict(tensor) for tensor in self.tensors]} if listed else {})}, indent=1)
        lines = [f"{t.file}  {t.name}  {t.dtype}  {list(t.shape)}  {t.bytes:,}" for t in self.tensors] if listed else []
        return "\n".join(
            [
                *lines,
                f"{self.model}: {len(self.tensors):,} tensors, {len(sizes):,} shards, {total:,} bytes, {parameters:,} parameters",
                f"a shard has {min(counts):,} to {max(counts):,} tensors, {min(sizes) / 1e9:.2f} to {max(sizes) / 1e9:.2f} GB",
            ]
        )


def plan_export(model: str, precision: Precision, shard_bytes: int) -> Export:
    """The export of `model`: a name of MODELS, a Hugging Face folder (of which only config.json is read), or a recipe."""
    config = _config(model)
    parts = [(entry, part) for entry in table(config) for part in entry.parts]
    sizes = [math.prod(part.shape) * dtype_of(entry, precision).itemsize for entry, part in parts]
    runs = plan_shards(sizes, shard_bytes)
    tensors = [
        Tensor(
            file=shard_name(number, len(runs)),
            name=part.name,
            dtype=NAMES[dtype_of(entry, precision)],
            shape=part.shape,
            bytes=size,
        )
        for number, run in enumerate(runs)
        for (entry, part), size in zip(parts[run.start : run.stop], sizes[run.start : run.stop], strict=True)
    ]
    return Export(model=model, tensors=tensors)


def _config(model: str) -> ModelConfig:
    if model in MODELS:
        return MODELS[model]()
    if Path(model).is_dir():
        return read_config(read_json(Path(model), "config.json", "give a Hugging Face model folder"), model).model
    if ":" not in model and not model.endswith((".yaml", ".yml")):
        raise ValueError(f"{model!r} is no model: give {', '.join(MODELS)}, a Hugging Face folder, or a RECIPE such as recipes.tiny:stdlib")
    return load_plan(model, []).model
