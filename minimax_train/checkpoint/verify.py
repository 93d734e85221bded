"""Verification that all ranks share: each takes checksums of its part of the files, so that no rank reads a large checkpoint alone."""

from pathlib import Path

from minimax_train.checkpoint.manifest import Damage, damage_of, listed
from minimax_train.checkpoint.record import Record, read_record
from minimax_train.checkpoint.shelf import checkpoints_in, damaged, newest_of, no_folder, none_verifies
from parallel.collectives import first_does, from_all
from parallel.groups import Groups


def damage_shared(checkpoint: Path, groups: Groups) -> str | None:
    """As `damage`, on every rank alike; all call it. OSError on every rank where one finds damage that the first rank does not find in the
    same file: no checkpoint is given up for what one machine sees."""
    entries: dict[str, tuple[int, str]] | str = first_does(lambda: _listed(checkpoint), groups.world)
    if isinstance(entries, str):
        return entries
    wrong = {
        name: said for name in _part(entries, groups.rank, groups.world.size()) if (said := damage_of(checkpoint, name, entries[name]))
    }
    found = from_all(wrong, groups.world)

    def agreed() -> str | None:
        for rank, said in enumerate(found):
            for name in said:
                if (again := damage_of(checkpoint, name, entries[name])) is not None:
                    return again
                raise OSError(f"rank {rank} finds that {checkpoint}/{said[name]}, and rank 0 finds it intact: look at that rank's machine")
        return None

    return first_does(agreed, groups.world)


def newest_shared(folder: Path, groups: Groups) -> tuple[Path | None, dict[Path, str]]:
    """As `newest_verified`, on every rank alike; all call it."""
    return newest_of(first_does(lambda: checkpoints_in(folder), groups.world), lambda checkpoint: damage_shared(checkpoint, groups))


def open_shared(path: Path, groups: Groups) -> tuple[Path, Record]:
    """The checkpoint that a user names, or the newest verified one of the run, and its record, on every rank alike; all call it.
    ValueError where there is none, or what is wrong with it."""
    if first_does((path / "checkpoints").is_dir, groups.world):
        newest, passed = newest_shared(path / "checkpoints", groups)
        if newest is None:
            raise none_verifies(path, passed)
        path = newest
    elif not first_does(path.is_dir, groups.world):
        raise no_folder(path)
    elif (wrong := damage_shared(path, groups)) is not None:
        raise damaged(path, wrong)
    return path, first_does(lambda: read_record(path), groups.world)


def _listed(checkpoint: Path) -> dict[str, tuple[int, str]] | str:
    try:
        return listed(checkpoint)
    except Damage as error:
        return str(error)


def _part(entries: dict[str, tuple[int, str]], rank: int, ranks: int) -> list[str]:
    """The files that a rank reads: from the largest on, each goes to the rank that has the fewest bytes."""
    bytes_of, names = [0] * ranks, dict[str, int]()
    for name in sorted(entries, key=lambda name: (-entries[name][0], name)):
        names[name] = bytes_of.index(min(bytes_of))
        bytes_of[names[name]] += entries[name][0] + 1
    return [name for name, owner in names.items() if owner == rank]
