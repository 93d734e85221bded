"""The Slurm that the room's tests share."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.slurm.daemons import Slurm, unpack


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Three nodes, n1 to n3, all idle."""
    root = Path(mkdtemp(prefix="slurm-"))  # short: the paths of sockets are
    cluster = Slurm(root / "c", unpack(root / "p"), nodes=3)
    cluster.start()
    yield cluster
    left = cluster.stop()
    shutil.rmtree(root)
    assert left == []
