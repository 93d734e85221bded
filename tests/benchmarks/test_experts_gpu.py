"""benchmarks/experts_gpu.py on a machine without a GPU: it walks through, or says why not."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.test_context_bytes import BENCHMARKS


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Every part runs, with finite figures, and nothing is written but where it was asked for."""
    subprocess.run([sys.executable, BENCHMARKS / "experts_gpu.py", "--rehearse", tmp_path], check=True, timeout=240)
    record = json.loads((tmp_path / "experts_gpu.json").read_text())
    assert {len(record[name]) for name in ("products", "swiglu", "overlap")} == {2 * 5, 2 * 2, 2 * 2 * 2 * 3}
    assert all(one["span_ms"] > 0 and one["exchange_ms"] > 0 for one in record["overlap"])
    first, second = record["step"]["losses"]
    assert second < first < 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there: it would be measured")
def test_says_why_it_measures_nothing() -> None:
    run = subprocess.run([sys.executable, BENCHMARKS / "experts_gpu.py"], check=True, timeout=120, capture_output=True, text=True)
    assert run.stdout.startswith("no CUDA device on this machine")


def test_a_stand_in_for_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """It copies while under way, and refuses routings in which what comes is not what goes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    busy = importlib.import_module("modelled_exchange")
    copied: list[int] = []
    channel, x = busy.Busy(2, copied.append, 7, "cpu"), torch.ones(4, 1)
    assert channel.begin_all_to_all(x, [2, 2], [1, 3], "dispatch").finish() is x
    assert copied == [7]
    with pytest.raises(ValueError, match="as many"):
        channel.begin_all_to_all(x, [2, 2], [2, 3], "dispatch")
    source = busy.make_copy("kernel", "cpu", 5000)
    source(4999)
    with pytest.raises(ValueError, match="copy engine"):
        busy.make_copy("network", "cpu", 8)
