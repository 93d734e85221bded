"""The CPU operator of lightning attention against its matrix products alone: forward and backward, one thread, side by side.

    python benchmarks/lightning_cpu.py [--quick]

B 1, 8 heads of 64. "Products alone" are the batched products of the operator's forward and backward with its chunk and block sizes, over
inputs that lie chunk by chunk and into outputs that exist: no decay, no scan, no copy, no allocation. Memory: the peak of a fresh process
at each length less that of one that only makes the inputs. Writes benchmarks/results/lightning_cpu.{json,md}.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import compare, machine
from torch import Tensor

from minimax_train.kernels import lightning_attention, lightning_cpu
from minimax_train.model.lightning import decay_slopes

HEADS, SIZE = 8, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {"fp32": 1.6, "bf16": 2.5}
TARGET_LENGTHS = (4096, 8192, 16_384)
LENGTHS = (*TARGET_LENGTHS, 32_768, 65_536)
MOST_SLOPE = 1.15


def inputs(tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v and do `[1, T, H, D]`, slopes of a middle layer."""
    g = torch.Generator().manual_seed(0)
    *qkv, do = (torch.randn(1, tokens, HEADS, SIZE, generator=g).to(dtype) for _ in range(4))
    return [x.requires_grad_() for x in qkv], do, decay_slopes(HEADS, 4, 8)


def operator(tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    qkv, do, slopes = inputs(tokens, dtype)

    def run() -> None:
        o, _ = lightning_attention(*qkv, slopes, backend="cpu")
        torch.autograd.grad(o, qkv, do)

    return run


def products(tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """Per chunk: forward K^T V, Q S, Q K^T, A V; backward K^T V, Q^T dO, Q K^T, dO V^T, A^T dO, K dS, G^T Q, V dS^T, G K, dO S^T."""
    chunk = lightning_cpu.chunk_size([0, tokens], dtype)
    chunks = max(1, lightning_cpu.FEWEST_TOKENS // chunk, lightning_cpu.BLOCK_NUMBERS // (chunk * HEADS * SIZE))
    shape = (tokens // (chunks * chunk), chunks * HEADS, chunk, SIZE)
    inputs, outputs = (torch.randn(4, *shape, dtype=dtype) for _ in range(2))
    scores, state = torch.randn(*shape[1:3], chunk, dtype=dtype), torch.randn(shape[1], SIZE, SIZE, dtype=dtype)
    sums = torch.empty_like(state)

    def run() -> None:
        for (q, k, v, _), (o, *_) in zip(inputs.unbind(1), outputs.unbind(1), strict=True):
            torch.bmm(k.mT, v, out=sums)
            torch.bmm(q, state, out=o)
            torch.bmm(q, k.mT, out=scores)
            o.baddbmm_(scores, v)
        for (q, k, v, do), (_, dq, dk, dv) in zip(inputs.unbind(1), outputs.unbind(1), strict=True):
            for a, b in ((k, v), (q, do)):
                torch.bmm(a.mT, b, out=sums)
            for a, b in ((q, k), (do, v)):
                torch.bmm(a, b.mT, out=scores)
            for a, x, p, b, out in ((k, state, scores.mT, do, dv), (v, state.mT, scores.mT, q, dk), (do, state.mT, scores, k, dq)):
                torch.bmm(a, x, out=out)
                out.baddbmm_(p, b)

    return run


def peak(tokens: int, precision: str, run: bool) -> int:
    """Bytes at the peak of a fresh process that makes the inputs, and runs the operator once."""
    script = f"import benchmarks.lightning_cpu as b; b.child({tokens}, {precision!r}, {run})"
    root = Path(__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'benchmarks')!r}]; {script}"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def child(tokens: int, precision: str, run: bool) -> None:
    torch.set_num_threads(1)
    operator(512, DTYPES[precision])()  # what libraries allocate once
    work = operator(tokens, DTYPES[precision])
    if run:
        work()
    status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's peak, if that was higher
    print(1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]))


def slope(points: list[tuple[int, float]]) -> float:
    """Least squares of log seconds over log tokens."""
    logs = [(math.log(tokens), math.log(seconds)) for tokens, seconds in points]
    x, y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)


def row(precision: str, tokens: int) -> dict[str, Any]:
    dtype = DTYPES[precision]
    compared = compare(products(tokens, dtype), operator(tokens, dtype), repeats=9 if tokens <= 16_384 else 5).as_dict()
    extra = peak(tokens, precision, True) - peak(tokens, precision, False)
    return {
        "precision": precision, "tokens": tokens, "products": compared["ours"], "operator": compared["theirs"], "ratio": compared["ratio"],
        "extra_bytes": extra, "tokens_per_second": tokens / compared["theirs"]["median"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# Lightning attention on CPU against its matrix products alone",
        "",
        f"Forward + backward, {HEADS} heads of {SIZE}, CPU seconds of one thread, median (least to most); ratio: median over pairs run "
        f"back to back. {facts['processor']}, torch {facts['torch']}, {facts['date']}.",
        "",
        "| precision | tokens | operator | products alone | ratio | wanted | tokens/s | extra memory, bytes a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [f"{r[k]['median']:.3f} ({r[k]['least']:.3f} to {r[k]['most']:.3f})" for k in ("operator", "products")]
        wanted = TARGETS[r["precision"]] if r["tokens"] in TARGET_LENGTHS else ""
        lines.append(
            f"| {r['precision']} | {r['tokens']:,} | {' | '.join(cells)} | {r['ratio']:.2f} | {wanted} | {r['tokens_per_second']:,.0f} | "
            f"{r['extra_bytes'] / r['tokens']:,.0f} |"
        )
    lines.append("")
    for precision in DTYPES:
        mine = [r for r in rows if r["precision"] == precision]
        time = slope([(r["tokens"], r["operator"]["median"]) for r in mine])
        memory = slope([(r["tokens"], r["extra_bytes"]) for r in mine])
        ends = f"{mine[0]['tokens']:,} to {mine[-1]['tokens']:,} tokens"
        lines.append(f"Log-log slope, {precision}, {ends}: time {time:.3f} (wanted: at most {MOST_SLOPE}), extra memory {memory:.3f}.")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4K and 8K only, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows = []
    for precision in DTYPES:
        for tokens in LENGTHS[:2] if quick else LENGTHS:
            rows.append(row(precision, tokens))
            print(f"{precision} {tokens}: {rows[-1]['ratio']:.2f}x its products", flush=True)
    facts = machine()
    print(table(rows, facts))
    if not quick:
        results = Path(__file__).parent / "results"
        (results / "lightning_cpu.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        (results / "lightning_cpu.md").write_text(table(rows, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
