"""What benchmarks/trace_reader.py reads out of a trace, on one made by hand: a layer's exchange forward and backward, another meanwhile."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parallel.testing import run_ranks
from parallel.world import Place

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NODE = "autograd::engine::evaluate_function: "


@pytest.fixture
def reader() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("trace_reader")


def event(name: str, start: float, end: float, sequence: int | None = None, thread: int = 1) -> dict[str, Any]:
    """Times in milliseconds; a trace has microseconds."""
    args = {} if sequence is None else {"Sequence number": sequence}
    return {"ph": "X", "name": name, "tid": thread, "ts": 1000 * (start + 7), "dur": 1000 * (end - start), "args": args}


EVENTS = [
    event("step", 0, 100),
    event("module: layer 3 qkv_proj", 1, 5),
    event("states: begin", 6, 7),
    event("gloo:all_to_all", 6.5, 20, thread=2),
    event("module: layer 3 output_gate", 8, 12),
    event("Linear", 9, 10, sequence=40),
    event("aten::mm", 9.2, 9.8),
    event("aten::mul", 12, 13),
    event("ring: begin", 13, 13.2),
    event("gloo:all_to_all", 13.1, 13.9, thread=3),
    event("ring: finish", 13.5, 14),
    event("_Finish", 14, 23, sequence=41),
    event("states: finish", 15, 22),
    event(NODE + "_FinishBackward", 50, 53, sequence=41),
    event("states: begin", 51, 52),
    event("gloo:all_to_all", 51.5, 55, thread=3),
    event(NODE + "LinearBackward", 54, 60, sequence=40),
    event(NODE + "_BeginBackward", 61, 63, sequence=39),
    event("states: finish", 62, 62.5),
]


def written(folder: Path, events: list[dict[str, Any]]) -> Path:
    path = folder / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_exchanges(reader: Any, tmp_path: Path) -> None:
    forward, other, backward = reader.Trace(written(tmp_path, EVENTS)).exchanges
    assert [(e.name, e.layer, e.backward, e.hop) for e in (forward, backward)] == [("states", "3", False, 1), ("states", "3", True, 1)]
    assert forward.between == pytest.approx({"layer 3 output_gate": 4, "mul": 1})
    assert backward.between == pytest.approx({"layer 3 output_gate, backward": 6})
    assert (forward.begun, forward.awaited, forward.finished, forward.lasted, forward.waited) == pytest.approx((6, 15, 22, 14, 5.5))
    assert (other.between, other.waited) == ({}, pytest.approx(0.4))
    assert (backward.lasted, backward.waited) == pytest.approx((4, 0))


def test_a_gather_beside(reader: Any, tmp_path: Path) -> None:
    """Gathers and all-to-alls are of two groups, whose works start in any order; gathers of others do not matter where we begin none."""
    mine = [
        *(event("gather: begin", 24, 25), event("c10d::_allgather_base_", 24.1, 24.9), event("gloo:all_gather", 24.2, 31, thread=2)),
        event("gather: finish", 26, 31),
    ]
    (gather,) = [e for e in reader.Trace(written(tmp_path, EVENTS + mine)).exchanges if e.name == "gather"]
    assert (gather.begun, gather.end, gather.waited) == (24, 31, 5)
    others = [event("gloo:all_gather", 80, 85, thread=4)]
    assert len(reader.Trace(written(tmp_path, EVENTS + others)).exchanges) == 3
    with pytest.raises(ValueError, match="zip"):
        reader.Trace(written(tmp_path, EVENTS + mine + others))


def test_an_exchange_that_is_not_awaited(reader: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="begun and not finished"):
        reader.Trace(written(tmp_path, EVENTS[:-1]))


def exchange_on_rank(place: Place, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.autograd.profiler import record_function

    from parallel.collectives import Channel
    from parallel.world import joined, meet

    with joined(place, "gloo", meet(place)):
        assert dist.group.WORLD is not None
        channel, x = Channel(dist.group.WORLD), torch.randn(2, 400, 400)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, record_function("step"):
            with record_function("module: layer 0 before"):
                x = x + 1
            pending = channel.begin_all_to_all(x, [1, 1], [1, 1], "states")
            with record_function("module: layer 0 meanwhile"):
                x @ x
            pending.finish()
        profile.export_chrome_trace(str(folder / f"{place.rank}.json"))


def test_a_real_trace(reader: Any, tmp_path: Path) -> None:
    """torch, gloo and Channel call things what the reader takes them for."""
    run_ranks(2, exchange_on_rank, tmp_path)
    for rank in range(2):
        (exchange,) = reader.Trace(tmp_path / f"{rank}.json").exchanges
        assert (exchange.name, exchange.layer, exchange.backward) == ("states", "0", False)
        assert list(exchange.between) == ["layer 0 meanwhile"]
        assert exchange.begun < exchange.awaited < exchange.finished
        assert exchange.begun < exchange.end
