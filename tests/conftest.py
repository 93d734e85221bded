"""Fixtures that several rooms' tests share."""

import gc
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support import little_corpus

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, as megatron-core does: its own functions are made for one mode
settings.register_profile("shared", deadline=None)  # a busy machine makes any example slow
settings.load_profile("shared")
os.environ["OMP_NUM_THREADS"] = "1"  # the processes that tests start: several ranks share few cores


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in one order, whatever the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def loaded_is_no_garbage() -> Iterator[None]:
    """Every session of ranks ends by collecting garbage, and looks at all that was ever imported: half a second each."""
    importlib.import_module("minimax_train.train.loop")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus; read only."""
    return little_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone() -> Iterator[object]:
    """A session of one rank."""
    from minimax_train.engine.session import session

    with session() as joined:
        yield joined
