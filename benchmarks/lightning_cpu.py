"""The CPU operator of lightning attention against its matrix products alone: forward and backward, one thread, side by side.

    python benchmarks/lightning_cpu.py [--quick]

B 1, 8 heads of 64. "Products alone" are the batched products of the operator's forward and backward with its chunk size, over inputs
that lie chunk by chunk and into outputs that exist: no decay, no scan, no copy, no allocation. They are done as many tokens at once as is
fastest for them, and counted: both sides do the same FLOPs. Extra memory: how far one call raises the peak of a fresh process that holds
the inputs, results and gradients included. Writes benchmarks/results/lightning_cpu.{json,md}, then ends with 1 where a target is missed.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import compare, machine, measure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minimax_train.kernels import lightning_attention, lightning_cpu
from minimax_train.model.lightning import decay_slopes

HEADS, SIZE = 8, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {"fp32": 1.6, "bf16": 2.5}
TARGET_LENGTHS = (4096, 8192, 16_384)
LENGTHS = (*TARGET_LENGTHS, 32_768, 65_536)
MOST_SLOPE = 1.15
FURTHEST_OFF = 0.1  # that extra memory at any length may lie off a straight line
BLOCKS = (128, 256, 512, 1024)  # tokens at once that are tried for the products alone, besides the whole sequence


def inputs(tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v and do `[1, T, H, D]`, slopes of a middle layer."""
    g = torch.Generator().manual_seed(0)
    *qkv, do = (torch.randn(1, tokens, HEADS, SIZE, generator=g, dtype=dtype) for _ in range(4))
    return [x.requires_grad_() for x in qkv], do, decay_slopes(HEADS, 4, 8)


def operator(tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    (q, k, v), do, slopes = inputs(tokens, dtype)

    def run() -> None:
        o, _ = lightning_attention(q, k, v, slopes, backend="cpu")
        torch.autograd.grad(o, (q, k, v), do)

    return run


def products(tokens: int, dtype: torch.dtype, block: int) -> Callable[[], None]:
    """Per chunk: forward K^T V, Q S, Q K^T, A V; backward K^T V, Q^T dO, Q K^T, dO V^T, A^T dO, K dS, G^T Q, V dS^T, G K, dO S^T."""
    chunk = lightning_cpu.chunk_size([0, tokens], dtype)
    shape = (tokens // block, block // chunk * HEADS, chunk, SIZE)
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


def fastest_block(tokens: int, dtype: torch.dtype) -> int:
    """Tokens at once at which the products alone take the least time."""
    return min((*BLOCKS, tokens), key=lambda block: measure(products(tokens, dtype, block), repeats=3).median)


def flops(work: Callable[[], None]) -> int:
    """FLOPs of the matrix products of `work`; torch's counter knows baddbmm, but not its form in place."""
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[-1]}  # of shapes
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    return int(counter.get_total_flops())


def extra_bytes(tokens: int, precision: str) -> int:
    """By how much the operator raises the peak memory of a fresh process that holds its inputs."""
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(here)!r}]; import lightning_cpu; lightning_cpu.child({tokens}, {precision!r})"
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)


def child(tokens: int, precision: str) -> None:
    torch.set_num_threads(1)
    operator(64, DTYPES[precision])()  # what libraries allocate once
    work = operator(tokens, DTYPES[precision])
    before = peak()
    work()
    print(peak() - before)


def peak() -> int:
    """The most bytes this process has held; getrusage would tell the parent's peak, if that was higher."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def row(precision: str, tokens: int) -> dict[str, Any]:
    """One length: the operator against its products, and its extra memory."""
    dtype = DTYPES[precision]
    block = fastest_block(tokens, dtype)
    alone, whole = products(tokens, dtype, block), operator(tokens, dtype)
    counted, wanted = flops(alone), flops(whole)
    if counted != wanted:
        raise RuntimeError(f"the operator's products are {wanted:,} FLOPs, those timed alone {counted:,}: nothing to compare")
    compared = compare(alone, whole, repeats=9 if tokens <= 16_384 else 5).as_dict()
    return {
        "precision": precision, "tokens": tokens, "operator": compared["theirs"], "products": compared["ours"], "ratio": compared["ratio"],
        "products_block": block, "flops": counted, "tokens_per_second": tokens / compared["theirs"]["median"],
        "extra_bytes": extra_bytes(tokens, precision),
    }  # fmt: skip


def fits(rows: list[dict[str, Any]], precision: str) -> dict[str, float]:
    """Slope of log seconds over log tokens; extra memory as a straight line in tokens, and the furthest a length lies off it."""
    mine = [r for r in rows if r["precision"] == precision]
    tokens, extra = [r["tokens"] for r in mine], [r["extra_bytes"] for r in mine]
    time, _ = statistics.linear_regression([math.log(t) for t in tokens], [math.log(r["operator"]["median"]) for r in mine])
    each, fixed = statistics.linear_regression(tokens, extra)
    off = max(abs(bytes_ / (fixed + each * t) - 1) for t, bytes_ in zip(tokens, extra, strict=True))
    return {"time_slope": time, "bytes_per_token": each, "fixed_bytes": fixed, "furthest_off": off}


def table(rows: list[dict[str, Any]], fitted: dict[str, dict[str, float]], facts: dict[str, Any]) -> str:
    lines = [
        "# Lightning attention on CPU against its matrix products alone",
        "",
        f"Forward + backward, {HEADS} heads of {SIZE}, CPU seconds of one thread, median (least to most); ratio: median over pairs run "
        f"back to back. Products alone: the same FLOPs, as many tokens at once as is fastest. Extra memory: o, dq, dk and dv included. "
        f"{facts['processor']}, torch {facts['torch']}, {facts['date']}.",
        "",
        "| precision | tokens | operator | products alone | ratio | wanted | tokens/s/core | extra memory, bytes a token |",
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
    ends = f"{rows[0]['tokens']:,} to {rows[-1]['tokens']:,} tokens"
    for precision, fit in fitted.items():
        lines.append(
            f"{precision}, {ends}: log-log slope of the time {fit['time_slope']:.3f} (wanted: at most {MOST_SLOPE}); extra memory "
            f"{fit['bytes_per_token']:,.0f} bytes a token + {fit['fixed_bytes'] / 2**20:.1f} MiB, no length further off than "
            f"{fit['furthest_off']:.1%}."
        )
    return "\n".join(lines) + "\n"


def missed(rows: list[dict[str, Any]], fitted: dict[str, dict[str, float]]) -> list[str]:
    """Every target that does not hold, in words."""
    wrong = [
        f"{r['precision']}, {r['tokens']:,} tokens: {r['ratio']:.2f}x its products (wanted: {TARGETS[r['precision']]})"
        for r in rows
        if r["tokens"] in TARGET_LENGTHS and r["ratio"] > TARGETS[r["precision"]]
    ]
    for precision, fit in fitted.items():
        if fit["time_slope"] > MOST_SLOPE:
            wrong.append(f"{precision}: log-log slope of the time {fit['time_slope']:.3f} (wanted: at most {MOST_SLOPE})")
        if fit["furthest_off"] > FURTHEST_OFF:
            wrong.append(f"{precision}: extra memory {fit['furthest_off']:.0%} off a straight line (wanted: at most {FURTHEST_OFF:.0%})")
    return wrong


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
    fitted = {precision: fits(rows, precision) for precision in DTYPES}
    print(table(rows, fitted, facts))
    if not quick:
        results = Path(__file__).parent / "results"
        (results / "lightning_cpu.json").write_text(json.dumps({"machine": facts, "rows": rows, "fits": fitted}, indent=1) + "\n")
        (results / "lightning_cpu.md").write_text(table(rows, fitted, facts))
    wrong = missed(rows, {} if quick else fitted)
    for line in wrong:
        print(f"MISSED: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
