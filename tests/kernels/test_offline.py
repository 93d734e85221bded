"""Every shipped Triton kernel compiled for an H100, without one: no stack, no spills, it fits, and it is on the tensor cores."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/kernel_resources.py"


def compiled(*options: str) -> list[dict[str, Any]]:
    """In a process of its own: in this one Triton may interpret. Prints a line per kernel (pytest -s)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, "--json", *options], capture_output=True, text=True, env=environment, timeout=880)
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    for row in rows:
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ")
    return rows


def test_the_released_heads() -> None:
    """Heads of 128 in bf16, and what stands beside attention."""
    rows = compiled("--short")
    assert {row["operator"].split(",")[0] for row in rows} == {
        "lightning steps",
        "lightning_attention",
        "gated norm",
        "rotary",
        "cross-entropy",
    }
    assert not any(row["stack"] or row["spills"] or row["shared"] > 227 * 1024 for row in rows)
    products = [row for row in rows if row["kernel"] in ("segment_states", "outputs", "query_gradient", "key_value_gradient")]
    assert len(products) >= 8 and all(row["HGMMA"] > 0 and row["TF32"] == 0 for row in products)


@pytest.mark.slow
@pytest.mark.timeout(900)  # CPU minutes: two are the disassembler, whether or not Triton has kept what it compiled
def test_no_kernel_spills() -> None:
    """Every form of every kernel."""
    rows = compiled()
    operators = {row["operator"] for row in rows}
    assert operators >= {f"lightning_attention, D {size}, {dtype}" for size in (64, 128) for dtype in ("bf16", "fp16", "fp32")}
    assert not any(row["stack"] or row["spills"] or row["shared"] > 227 * 1024 for row in rows)
    kinds = {operator.split(",")[0] for operator in operators}
    assert kinds == {"lightning steps", "lightning_attention", "gated norm", "rotary", "cross-entropy"}
    products = [row for row in rows if row["kernel"] in ("segment_states", "outputs", "query_gradient", "key_value_gradient")]
    assert all((row["HGMMA"] > 0) == ("fp32" not in row["operator"]) and row["TF32"] == 0 for row in products)
    assert operators >= {f"lightning steps, D {size}, fp16" for size in (64, 128)}
    for size, dtype in itertools.product((64, 128), ("bf16", "fp32")):
        every_form_of_the_steps([row for row in rows if row["operator"] == f"lightning steps, D {size}, {dtype}"], size)


def every_form_of_the_steps(rows: list[dict[str, Any]], size: int) -> None:
    """With and without states between segments, from other ranks and for them; the model's heads on 1, 8 and 64 tensor ranks."""
    switches = {
        "segment_states": ("REVERSE", "ENDS"), "scan_states": ("REVERSE", "ENDS"), "outputs": ("SLOTS", "INITIAL"),
        "query_gradient": ("SLOTS", "INITIAL"), "key_value_gradient": ("SLOTS", "FINAL"),
    }  # fmt: skip
    for kernel, names in switches.items():
        forms = {tuple(row["constants"][name] for name in names) for row in rows if row["kernel"] == kernel}
        assert forms == set(itertools.product((False, True), repeat=2)), kernel
    widths = {row["constants"]["stride_ot"] for row in rows if row["kernel"] == "outputs"}
    assert widths == {heads * size for heads in (64, 8, 1)}
