"""Files that travel with the weights: tokenizer, generation settings, licence, and the release's own code, copied but never run."""

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data.commit import sync
from minimax_train.convert.config import Format, same_format
from minimax_train.convert.source import LARGEST_TEXT, inside, read_json

FOLDER = "hugging_face"
"""Inside a checkpoint."""
CONFIG = "config.json"
PATTERNS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "generation_config.json",
    "LICENSE", "LICENSE[.-]*", "NOTICE", "NOTICE[.-]*",
)  # fmt: skip


def carry_in(source: Path, raw_config: dict[str, Any], checkpoint: Path) -> None:
    """Copies what travels from a Hugging Face folder into a checkpoint, with its config.json."""
    names = [*_named(source), *_code(source, raw_config)]
    (checkpoint / FOLDER).mkdir(exist_ok=True)
    for name in dict.fromkeys((CONFIG, *names)):
        _copy(source, name, checkpoint / FOLDER)


def check(source: Path, raw_config: dict[str, Any]) -> None:
    """ValueError where one of the files may not be read; before anything is converted."""
    for name in [*_named(source), *_code(source, raw_config)]:
        _size(inside(source, name))


def origin(checkpoint: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """What travelled with a checkpoint, or with the run it belongs to: the folder, and its config.json."""
    checkpoint = checkpoint.resolve()
    for folder in (checkpoint / FOLDER, checkpoint.parent.parent / FOLDER):
        if (folder / CONFIG).is_file() and (folder.parent == checkpoint or checkpoint.parent.name == "checkpoints"):
            return folder, read_json(folder, CONFIG, "")
    return None, None


def keep(checkpoint: Path, run: Path) -> None:
    """Copies what travelled with the checkpoint that a run begins from into the run, for the exports of the run's own checkpoints."""
    source, _ = origin(checkpoint)
    if source is not None:
        shutil.copytree(source, run / FOLDER, dirs_exist_ok=True)


def carry_out(source: Path, raw_config: dict[str, Any], kind: Format, export: Path) -> None:
    """Copies what travelled to an export; the code only where the format is the one it was made for."""
    names = _named(source)
    if same_format(raw_config, kind):
        names += _code(source, raw_config)
    for name in names:
        _copy(source, name, export)


def _named(source: Path) -> list[str]:
    return sorted(p.name for p in source.iterdir() if any(fnmatch(p.name, pattern) for pattern in PATTERNS))


def _code(source: Path, raw_config: dict[str, Any]) -> list[str]:
    """The files that auto_map names, where they are there."""
    auto_map = raw_config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    names = {f"{value.split('.')[0]}.py" for value in values if isinstance(value, str) and "--" not in value}
    return sorted(name for name in names if name == Path(name).name and os.path.lexists(source / name))


def _copy(source: Path, name: str, target: Path) -> None:
    path = inside(source, name)
    _size(path)
    shutil.copyfile(path, target / name)
    sync(target / name)


def _size(path: Path) -> None:
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: no file of a tokenizer or a licence is as large; remove it")
