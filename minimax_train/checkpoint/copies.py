"""Copies of checkpoints: every byte is compared with the manifest as it is read, forced to the disk, and read back."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minimax_train.checkpoint.commit import committed
from minimax_train.checkpoint.manifest import listed
from minimax_train.engine.hashed import PIECE, Hashed, read_back

FILES = 4
"""Files that are copied at a time. Ours."""


def copy_checkpoint(source: Path, final: Path, moved: Callable[[int], None] = lambda _: None) -> None:
    """`final` appears complete or not at all. `moved` hears of bytes that were read or read back, from several threads.

    ValueError where `final` is there already, or `source` is no whole checkpoint; OSError where it turns out damaged, or a disk refuses.
    """
    entries = listed(source)
    with committed(final, known=entries) as temporary:
        for folder in sorted({(temporary / name).parent for name in entries}):
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(FILES) as pool:
            try:
                copying = [pool.submit(_copy, source / name, temporary / name, entry, moved) for name, entry in entries.items()]
                for one in copying:
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _copy(source: Path, target: Path, entry: tuple[int, str], moved: Callable[[int], None]) -> None:
    with source.open("rb", buffering=0) as file, Hashed(target) as hashed:
        while block := file.read(PIECE):
            hashed.write(block)
            moved(len(block))
    if (hashed.size, hashed.digest()) != entry:
        raise OSError(f"{source} was changed: its checksum does not hold")
    if read_back(target, moved) != entry:
        raise OSError(f"{target} gives back other bytes than were written")
