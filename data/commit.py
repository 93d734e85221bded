"""All or nothing on disk: work in a hidden folder beside the target, make it durable, rename it into place."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.format import SUFFIXES, Sidecar, checksum_of, file_of


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


def finish_commit(stage: Path, prefix: Path) -> Sidecar | None:
    """Takes up a commit that was interrupted by a kill: the sidecar of what is now at PREFIX, or None where the files are not all there."""
    if not file_of(stage, ".json").is_file():
        return None
    try:
        sidecar = Sidecar.load(file_of(stage, ".json"))
    except ValueError:
        return None
    for suffix, record in sidecar.files.items():
        path = file_of(stage if file_of(stage, suffix).exists() else prefix, suffix)
        if not path.is_file() or checksum_of(path) != record:
            return None
    for path in existing(prefix):
        if path not in {file_of(prefix, suffix) for suffix in sidecar.files}:
            path.unlink()
    for suffix in (*sidecar.files, ".json"):
        if file_of(stage, suffix).exists():
            sync(file_of(stage, suffix))
            file_of(stage, suffix).rename(file_of(prefix, suffix))
    sync(prefix.parent)
    return sidecar


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
