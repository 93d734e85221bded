"""Every shipped Triton kernel compiled for an H100, without one: no stack, no spills, it fits, and it is on the tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/kernel_resources.py"


def test_no_kernel_spills() -> None:
    """In a process of its own: in this one Triton may interpret. Prints a line per kernel (pytest -s)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    for row in rows:
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ")
    operators = {row["operator"] for row in rows}
    assert operators >= {f"lightning, D {size}, {dtype}" for size in (64, 128) for dtype in ("bf16", "fp16", "fp32")}
    assert not any(row["stack"] or row["spills"] or row["shared"] > 227 * 1024 for row in rows)
    assert {operator.split(",")[0] for operator in operators} == {"lightning", "gated norm", "rotary", "cross-entropy"}
    products = [row for row in rows if row["kernel"] in ("segment_states", "outputs", "query_gradient", "key_value_gradient")]
    assert all((row["HGMMA"] > 0) == ("fp32" not in row["operator"]) and row["TF32"] == 0 for row in products)
