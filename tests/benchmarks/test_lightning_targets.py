"""The verdicts of benchmarks/lightning_gpu.py and lightning_cpu.py on made-up figures, and the deadline."""

import importlib
import time
from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks.test_context_bytes import BENCHMARKS


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("lightning_gpu")


def figures(gpu: ModuleType, *, multiple: float = 1.9, times: float = 3.5, whole: float = 72e9) -> list[dict[str, Any]]:
    """Rows of ours and fla, with the time a token the same everywhere."""
    rows = []
    for heads, tokens in gpu.CASES:
        for operator, factor in (("ours", 1.0), ("fla", times)):
            both = {"median": 1e-6 * tokens * heads * factor, "multiple_of_floor": multiple * factor}
            rows.append({"operator": operator, "heads": heads, "tokens": tokens, "both": both, "whole_bytes": whole})
    return rows


def failing(gpu: ModuleType, rows: list[dict[str, Any]]) -> list[str]:
    return [line for line, holds in gpu.verdicts(rows) if not holds]


def test_targets_on_a_gpu(gpu: ModuleType) -> None:
    good = figures(gpu)
    assert failing(gpu, good) == []
    assert len(gpu.verdicts(good)) == 7
    (slow,) = failing(gpu, figures(gpu, multiple=2.2))  # 8 heads may take 2.5
    assert slow.startswith("64 heads")
    assert slow.endswith("MISSED")
    assert ["fla" in line for line in failing(gpu, figures(gpu, times=2.0))] == [True, True]
    (large,) = failing(gpu, figures(gpu, whole=81e9))
    assert "81.00 GB (wanted: 80): MISSED" in large


@pytest.mark.parametrize(("reason", "verdict"), [("OutOfMemoryError: CUDA out of memory", "MISSED"), ("not timed", "not measured")])
def test_what_was_not_measured_does_not_hold(gpu: ModuleType, reason: str, verdict: str) -> None:
    rows = figures(gpu)
    cut = [{k: v for k, v in r.items() if k not in ("both", "whole_bytes")} | {"failed": reason} if r["heads"] == 32 else r for r in rows]
    (line,) = failing(gpu, cut)
    assert reason in line
    assert line.endswith(verdict)
    assert len(failing(gpu, [])) == 7
    assert all(line.endswith("not measured") for line in failing(gpu, []))


def test_deadline(gpu: ModuleType) -> None:
    """It stops what is running, and what begins after it."""
    start = time.monotonic()
    for wait in (0.05, -1.0):
        with pytest.raises(gpu.OutOfTime), gpu.until(start + wait):
            time.sleep(30)
    with gpu.until(start + 1000):
        pass
    assert time.monotonic() - start < 10


def test_targets_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cpu = importlib.import_module("lightning_cpu")
    rows = [{"precision": "fp32", "tokens": 8192, "ratio": 1.5}, {"precision": "bf16", "tokens": 65_536, "ratio": 3.0}]  # no target at 64K
    fitted = {"fp32": {"time_slope": 1.1, "furthest_off": 0.02}}
    assert cpu.missed(rows, fitted) == []
    assert len(cpu.missed([rows[0] | {"ratio": 1.7}], {"bf16": {"time_slope": 1.2, "furthest_off": 0.2}})) == 3
