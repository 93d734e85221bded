"""Experts on one GPU: grouped products, SwiGLU, exchanges of modelled duration beside them, and one training step over NCCL.

    python benchmarks/experts_gpu.py [--rehearse DIRECTORY]

MiniMax-Text-01's sizes, bf16: hidden 6144, expert width 9216, the four experts that a rank of EP 8 has.
1. The products of kernels/grouped_linear.py at 128 to 8192 rows an expert, against one torch.matmul over all these rows.
2. SwiGLU's forward and backward (model/swiglu.py) at the same rows.
3. parallel/experts.py as it is, 8,192 tokens a rank, with stand-ins that keep a side stream busy for as long as an exchange is to last
   (modelled_exchange.py): the share hidden, (exchange + compute - span) / exchange, for 1, 2 and 4 token groups.
4. A step of the tiny model in bf16 with NCCL in a world of one (its Channels have nobody to talk to).
Writes benchmarks/results/experts_gpu.{json,md}. Without a GPU it says so and ends with 0; --rehearse walks through it on a CPU, at sizes
that say nothing about speed, and writes to DIRECTORY.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_gpu import Bench, ceilings
from machine import machine
from torch import Tensor

EP, EXPERTS = 8, 4
"""Expert ranks modelled, experts a rank has."""
GROUPS, RATIOS, KINDS = (1, 2, 4), (0.5, 1.0), ("copy engine", "kernel")
MARK = 0.9


@dataclass(frozen=True, kw_only=True)
class Sizes:
    hidden: int
    width: int
    rows: tuple[int, ...]
    """Of an expert."""
    tokens: int
    """Of a rank, two choices each."""
    largest: int
    """Numbers that an exchange may copy."""


FULL = Sizes(hidden=6144, width=9216, rows=(128, 256, 512, 1024, 2048, 4096, 8192), tokens=8192, largest=1 << 29)
REHEARSED = Sizes(hidden=32, width=48, rows=(8, 16), tokens=64, largest=1 << 14)


def experts_weights(bench: Bench, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """gate_up `[E, 2f, hidden]`, down `[E, hidden, f]`."""
    shapes = ((EXPERTS, 2 * sizes.width, sizes.hidden), (EXPERTS, sizes.hidden, sizes.width))
    gate_up, down = (torch.randn(shape, device=bench.device, dtype=bench.dtype) * 0.02 for shape in shapes)
    return gate_up, down


def products(bench: Bench, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """hidden -> width for each expert, its two gradients, and one product of as many rows."""
    from minimax_train.kernels import grouped_linear as g

    weight = experts_weights(bench, sizes)[0][:, : sizes.width].contiguous()
    for rows in sizes.rows:
        total = rows * EXPERTS
        x, dy = (torch.randn(total, n, device=bench.device, dtype=bench.dtype) for n in (sizes.hidden, sizes.width))
        bounds = {name: g.Bounds([rows] * EXPERTS, x.device, name) for name in g.BACKENDS}
        works = {
            "matmul": lambda x=x: x @ weight[0].t(),
            **{name: lambda x=x, b=b: g.grouped_linear(x, weight, b) for name, b in bounds.items()},
            "input gradient": lambda dy=dy, b=bounds["grouped"]: g.grouped_linear_input_gradient(dy, weight, b),
            "weight gradient": lambda x=x, dy=dy, b=bounds["grouped"]: g.grouped_linear_weight_gradient(dy, x, b),
        }
        for name, work in works.items():
            timing = bench.time(work)
            flops = 2 * total * sizes.hidden * sizes.width
            yield {"rows": rows, "product": name, "ms": timing.median, "tflops": flops / timing.median / 1e9}


def swiglu(bench: Bench, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """parallel.experts.Compute's forward, and forward with both gradients."""
    from minimax_train.model.swiglu import SwiGLU

    compute, weights = SwiGLU(backend="grouped"), experts_weights(bench, sizes)
    for rows in sizes.rows:
        counts = [rows] * EXPERTS
        x = torch.randn(rows * EXPERTS, sizes.hidden, device=bench.device, dtype=bench.dtype)

        def forward(x: Tensor = x, counts: list[int] = counts) -> object:
            return compute.outputs(x, counts, weights)

        def both(x: Tensor = x, counts: list[int] = counts) -> object:
            y, kept = compute.outputs(x, counts, weights)
            _, for_weights = compute.input_gradient(y, counts, weights, kept)
            return compute.weight_gradients(counts, for_weights)

        flops = 6 * len(x) * sizes.hidden * sizes.width
        for name, work, times in (("forward", forward, 1), ("forward + backward", both, 3)):
            timing = bench.time(work)
            yield {"rows": rows, "pass": name, "ms": timing.median, "tflops": times * flops / timing.median / 1e9}


class OneRank:
    """What a rank of EP ranks does for one layer, evenly routed, with exchanges of `numbers` copied."""

    def __init__(self, bench: Bench, sizes: Sizes, copy: Any, weights: tuple[Tensor, Tensor]) -> None:
        self.bench, self.sizes, self.copy, self.weights = bench, sizes, copy, weights

    def run(self, groups: int, numbers: int, *, backward: bool) -> float:
        """Milliseconds of forward, or of forward and backward."""
        from modelled_exchange import Busy, groups_of

        from minimax_train.model.swiglu import SwiGLU
        from parallel.expert_plan import plan_trips
        from parallel.experts import Journey, experts_over_ranks

        each = 2 * self.sizes.tokens // (groups * EP * EXPERTS)  # rows of a rank, group and expert
        trips = tuple(plan_trips(torch.full((EP, groups, EP * EXPERTS), each), (0, 0), (EP, 1), 8))
        journey = Journey(trips=trips, order=torch.empty(0), inverse=torch.empty(0), rows=each * groups * EP * EXPERTS)
        over = groups_of(Busy(EP, self.copy, numbers, self.bench.device), Busy(1, self.copy, 0, self.bench.device))
        rows = torch.randn(journey.rows, self.sizes.hidden, device=self.bench.device, dtype=self.bench.dtype, requires_grad=backward)
        weights = tuple(w.requires_grad_(backward) for w in self.weights)

        def work() -> None:
            out = experts_over_ranks(rows, weights, SwiGLU(backend="grouped"), journey, over)
            if backward:
                torch.autograd.grad(out, (rows, *weights), out.detach())

        return self.bench.time(work).median


def overlap(bench: Bench, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Compute without exchanges, exchanges without compute, and both as parallel/experts.py orders them."""
    from modelled_exchange import Busy, make_copy

    weights = experts_weights(bench, sizes)
    for kind in KINDS:
        copy = make_copy(kind, bench.device, sizes.largest)
        rank = OneRank(bench, sizes, copy, weights)
        speed = sizes.largest / bench.time(lambda c=copy: c(sizes.largest)).median  # numbers a millisecond
        for backward in (False, True):
            whole = rank.run(1, 0, backward=backward)
            for ratio in RATIOS:
                for groups in GROUPS:
                    exchanges = groups * (4 if backward else 2)
                    numbers = min(max(int(ratio * whole / exchanges * speed), 1), sizes.largest)
                    busy = Busy(EP, copy, numbers, bench.device)
                    exchange = bench.time(lambda b=busy, n=exchanges: b.alone(n)).median
                    compute, span = rank.run(groups, 0, backward=backward), rank.run(groups, numbers, backward=backward)
                    yield {
                        "kind": kind, "pass": "forward + backward" if backward else "forward", "ratio": ratio, "groups": groups,
                        "compute_ms": compute, "exchange_ms": exchange, "span_ms": span,
                        "hidden": (exchange + compute - span) / exchange, "bound": 1 - 1 / groups,
                    }  # fmt: skip


def step(bench: Bench) -> dict[str, Any]:
    """One step of the tiny model, then another that is timed."""
    from minimax_train.engine.session import session
    from minimax_train.engine.trainer import Trainer
    from minimax_train.model.row import Row
    from minimax_train.recipe import load_plan

    device: Any = bench.device
    precision: Any = "bf16" if device == "cuda" else "fp32"
    plan = replace(load_plan("recipes.tiny:stdlib"), device=device, precision=precision)
    with session(device) as joined:
        ids = torch.randint(0, 256, (2049,), generator=torch.Generator().manual_seed(0))
        row = Row.of_documents([ids[:-1]]).with_labels(ids[1:]).to(joined.device)
        trainer = Trainer(plan, joined)
        first = trainer.step([row], 1e-3)
        start = time.perf_counter()
        second = trainer.step([row], 1e-3)  # its report is on the host: nothing is left to wait for
        seconds = time.perf_counter() - start
    backend = "nccl" if device == "cuda" else "gloo"
    return {"backend": backend, "precision": precision, "losses": [first.loss, second.loss], "second_step_ms": 1e3 * seconds}


def table(record: dict[str, Any]) -> str:
    facts, ceiling, one = record["machine"], record["ceilings"]["flops_per_second"] / 1e12, record["step"]
    names = list(dict.fromkeys(p["product"] for p in record["products"]))
    lines = [
        "# Experts on one GPU", "",
        f"{facts['device']}, torch {facts['torch']}, {facts['date']}, {record['dtype']}; {EXPERTS} experts of hidden "
        f"{record['sizes']['hidden']}, width {record['sizes']['width']}. Medians of device time. A large product here: "
        f"{ceiling:.0f} TFLOP/s.",
        "", "## Products, TFLOP/s", "",
        f"| rows an expert | {' | '.join(names)} | grouped / matmul |",
        "|---" * (len(names) + 2) + "|",
    ]  # fmt: skip
    for rows in dict.fromkeys(p["rows"] for p in record["products"]):
        by = {p["product"]: p["tflops"] for p in record["products"] if p["rows"] == rows}
        lines.append(f"| {rows:,} | {' | '.join(f'{by[n]:.0f}' for n in names)} | {by['grouped'] / by['matmul']:.0%} |")
    lines += ["", "## SwiGLU", "", "| rows an expert | pass | ms | TFLOP/s |", "|---|---|---|---|"]
    lines += [f"| {s['rows']:,} | {s['pass']} | {s['ms']:.3f} | {s['tflops']:.0f} |" for s in record["swiglu"]]
    lines += [
        "", "## Exchanges of modelled duration", "",
        f"One rank of EP {EP}, {record['sizes']['tokens']:,} tokens, two choices, evenly routed. A stand-in for a network: a copy engine "
        "takes nothing from the products (the most that can be hidden), a copy kernel runs on 20 multiprocessors beside them. Compute: the "
        "same token groups without exchanges; 1 - 1 / groups is the bound of a forward pass. Exchange / compute: as asked for (measured).",
        "",
        "| by | pass | exchange / compute | groups | compute ms | exchange ms | span ms | hidden | bound | 0.9 of the bound |",
        "|---" * 10 + "|",
    ]  # fmt: skip
    for o in record["overlap"]:
        cells = " | ".join(f"{o[name]:.2f}" for name in ("compute_ms", "exchange_ms", "span_ms"))
        verdict = "holds" if o["hidden"] >= MARK * o["bound"] else "MISSED"
        lines.append(
            f"| {o['kind']} | {o['pass']} | {o['ratio']} ({o['exchange_ms'] / o['compute_ms']:.2f}) | {o['groups']} | {cells} | "
            f"{o['hidden']:.0%} | {o['bound']:.0%} | {verdict} |"
        )
    losses = " then ".join(f"{loss:.4f}" for loss in one["losses"])
    lines += ["", "## A training step in a world of one", ""]
    lines.append(f"{one['backend']}, tiny model, {one['precision']}: loss {losses}; the second step took {one['second_step_ms']:.0f} ms.")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", metavar="DIRECTORY", type=Path, help="walk through it on a CPU; figures mean nothing; written there")
    folder = parser.parse_args().rehearse
    if not torch.cuda.is_available() and folder is None:
        print("no CUDA device on this machine: nothing measured, nothing written (--rehearse DIRECTORY walks through it on the CPU)")
        return 0
    if folder is not None:
        os.environ["TRITON_INTERPRET"] = "1"
    device, dtype = ("cpu", torch.float32) if folder else ("cuda", torch.bfloat16)
    bench = Bench(device=device, dtype=dtype, size=128, deadline=0.0)
    sizes = REHEARSED if folder else FULL
    record: dict[str, Any] = {"machine": machine(), "dtype": str(dtype).removeprefix("torch."), "sizes": vars(sizes)}
    record["ceilings"] = ceilings(bench)
    for name, part in (("products", products), ("swiglu", swiglu), ("overlap", overlap)):
        start = time.monotonic()
        record[name] = list(part(bench, sizes))
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    record["step"] = step(bench)
    results = folder or Path(__file__).parent / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "experts_gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / "experts_gpu.md").write_text(table(record))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
