"""The commit protocol: a folder appears complete and under its final name, or not at all.

A new temporary folder beside the final one -> every rank writes into it -> one manifest with every file's checksum -> all of it
forced to the disk -> one rename. A folder is never written twice.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from data.commit import sync
from minimax_train.checkpoint.manifest import write_manifest

TEMPORARY = ".partial-"


def begin(final: Path) -> Path:
    """A fresh, empty folder beside `final`. ValueError where `final` already exists."""
    if final.exists():
        raise ValueError(f"{final} already exists and is never written over: remove it or choose another folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f"{TEMPORARY}{final.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary


def commit(temporary: Path, final: Path, known: Mapping[str, tuple[int, str]] | None = None) -> None:
    """Writes the manifest, forces everything to the disk, and renames the folder to `final`. `known`: as write_manifest takes it."""
    write_manifest(temporary, known)
    temporary.rename(final)
    sync(final.parent)


def abandon(temporary: Path) -> None:
    """Removes a folder that will not be committed."""
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def committed(final: Path, known: Mapping[str, tuple[int, str]] | None = None) -> Iterator[Path]:
    """For one process: gives the folder to fill; on leaving without an error it is committed, otherwise abandoned. `known`: as
    write_manifest takes it."""
    temporary = begin(final)
    try:
        yield temporary
        commit(temporary, final, known)
    except BaseException:
        abandon(temporary)
        raise


def remove_leftovers(parent: Path) -> list[Path]:
    """Removes what a killed writer left behind, and says what. Only for the one process that owns the folder."""
    leftovers = sorted(parent.glob(f"{TEMPORARY}*"))
    for path in leftovers:
        abandon(path)
    return leftovers


def replace_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
