"""All or nothing on disk: work in a hidden folder beside the target, make it durable, rename it into place."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.format import SUFFIXES, file_of


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A fresh folder `.NAME.partial-*` beside `target`, on the same file system; it is gone on every exit, Ctrl-C included."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's entries, are on disk. Raises OSError (a full disk may show only here)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing(prefix: Path) -> list[Path]:
    """The files of PREFIX that are there already."""
    return [path for path in (file_of(prefix, suffix) for suffix in SUFFIXES) if os.path.lexists(path)]


def commit_files(stage: Path, prefix: Path, *, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Moves the files staged as `stage` + suffix to `prefix` + suffix, the sidecar last. What stood there is replaced, its sidecar first.

    On any failure nothing of the new dataset stays; then an older one that was being replaced is gone as well.
    """
    for suffix in suffixes:
        sync(file_of(stage, suffix))
    placed: list[Path] = []
    try:
        for path in reversed(existing(prefix)):  # the sidecar goes first: from here on there is no dataset
            path.unlink()
        for suffix in suffixes:
            target = file_of(prefix, suffix)
            placed.append(target)
            file_of(stage, suffix).rename(target)
        sync(prefix.parent)
    except BaseException:
        for path in reversed(placed):
            path.unlink(missing_ok=True)
        raise


def commit_folder(stage: Path, target: Path) -> bool:
    """Renames the folder `stage` to `target`. False when another process has put a folder there first: then that one stays."""
    for path in (*stage.iterdir(), stage):
        sync(path)
    try:
        stage.rename(target)
    except OSError:
        if target.is_dir() and any(target.iterdir()):
            return False
        raise
    sync(target.parent)
    return True
