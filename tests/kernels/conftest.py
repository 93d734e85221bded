"""Where the kernels of these tests run: a GPU, else the CPU, through Triton's interpreter (tests/conftest.py turns it on)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory may hold anything: here it holds NaN, or a number far from any index, so that reading it is seen."""
    new_empty, empty, empty_like = Tensor.new_empty, torch.empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(float("nan") if x.is_floating_point() else -(1 << 20))

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poisoned(new_empty(self, *a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    yield
