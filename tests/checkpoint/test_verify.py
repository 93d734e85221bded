"""Verification shared by ranks finds what one rank's finds, reads every file once, and believes no single machine."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minimax_train.checkpoint.verify as verify
from minimax_train.checkpoint.manifest import damage, write_manifest
from minimax_train.checkpoint.verify import damage_shared
from minimax_train.engine.session import session
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place

SIZES = {f"file{number}": size for number, size in enumerate((0, 1, 10, 1000, 1000, 3000, 5000))}
Work = Callable[[Path], Any]


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    for name, size in SIZES.items():
        (folder / name).write_bytes(os.urandom(size))
    write_manifest(folder)
    return folder


def flip(folder: Path) -> None:
    data = bytearray((folder / "file3").read_bytes())
    data[500] ^= 1
    (folder / "file3").write_bytes(data)


DAMAGE: dict[str, tuple[Work, str | None]] = {
    "none": (lambda _: None, None),
    "flipped": (flip, "file3 was changed: its checksum does not hold"),
    "missing": (lambda folder: (folder / "file5").unlink(), "file5 is missing"),
    "cut": (lambda folder: os.truncate(folder / "file6", 4999), "file6 has 4999 bytes, not 5000"),
    "a folder": (lambda folder: ((folder / "file1").unlink(), (folder / "file1").mkdir()), "file1 is missing"),
}


def looks(place: Place, root: Path) -> None:
    """One rank of three: every checkpoint under `root`, with what each rank read written beside it."""
    read: list[str] = []
    whole = verify.damage_of
    with session(place=place, layout=Layout()) as joined, pytest.MonkeyPatch.context() as patch:

        def notes(folder: Path, name: str, entry: tuple[int, str]) -> str | None:
            read.append(name)
            if folder.name == "blind" and place.rank == 2:
                return f"{name} cannot be read: Input/output error"
            return whole(folder, name, entry)

        patch.setattr(verify, "damage_of", notes)
        for kind, (_, says) in DAMAGE.items():
            read.clear()
            assert damage_shared(root / kind, joined.groups) == says
            if kind == "none":
                (root / f"read-{place.rank}").write_text("\n".join(read))
        with pytest.raises(
            OSError, match=r"rank 2 finds that .*blind/file\d cannot be read: Input/output error, and rank 0 finds it intact"
        ):
            damage_shared(root / "blind", joined.groups)


def test_ranks_share_it(tmp_path: Path) -> None:
    for kind, (work, says) in DAMAGE.items():
        work(checkpoint(tmp_path / kind))
        assert damage(tmp_path / kind) == says
    checkpoint(tmp_path / "blind")
    run_ranks(3, looks, tmp_path)
    parts = [(tmp_path / f"read-{rank}").read_text().split() for rank in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(SIZES)
    assert parts[0][0] == "file6" and parts[1][0] == "file5"  # the largest each to a rank of its own
    assert max(sum(SIZES[name] for name in part) for part in parts) == 5000
