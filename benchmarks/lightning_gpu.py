"""Lightning attention on one GPU: multiples of the memory floor, and against flash-linear-attention, lightning-attn and flash attention.

    python benchmarks/lightning_gpu.py [--minutes 3.5] [--rehearse DIRECTORY]

B 1, heads 8 and 64 of 128, bf16, 8K to 1M tokens: forward, backward and both. Copy bandwidth and the matrix-product ceiling are measured
first, in the same process. Floor of a token and head: 8 D bytes forward (q, k, v in, o out), 14 D backward (q, k, v, do in, dq, dk, dv
out), at the copy bandwidth. "layer" is what the model runs between its projections, on one rank: SiLU of the packed qkv, then the operator
in steps (lightning_over_pieces); its floor is the same, as if SiLU moved nothing. Peers run if installed (pip install fla-core
lightning-attn). When the minutes are over, whatever is running is stopped, and all that is left is said not to be timed. Writes
benchmarks/results/lightning_gpu.{json,md,png}, then ends with 1 unless every target was measured and holds. Without a GPU it says so and
ends with 0; --rehearse walks through it on a CPU, at sizes that say nothing about speed, and judges nothing.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import machine
from torch import Tensor

from parallel.collectives import Channel
from parallel.exchange import Gather
from parallel.lightning import Passing, lightning_over_pieces
from parallel.pieces import cut_row
from parallel.states import state_flow
from parallel.world import Place, joined, meet

SIZE = 128
LENGTHS = (8192, 32_768, 131_072, 524_288, 1_048_576)
CASES = [*((8, tokens) for tokens in LENGTHS), *((64, tokens) for tokens in LENGTHS), (32, 1_048_576)]
FLASH_LONGEST = 32_768  # softmax is quadratic: longer rows would take the whole run
INSIDE = (32, 1_048_576, 80e9)  # heads, tokens, bytes of GPU memory at most, inputs and gradients included
TARGETS = {64: (2.0, 2.5), 8: (2.5, 3.0)}  # heads: most multiples of the floor, least times faster than fla; forward + backward, T >= 32K


class OutOfTime(BaseException):
    """The script's minutes are over. Not an Exception, which a peer's tuning might catch."""


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Raises OutOfTime inside the `with` when time.monotonic() is past the deadline, also while the device or a compiler is waited for."""

    def ring(*_: object) -> None:
        raise OutOfTime

    before, left = signal.signal(signal.SIGALRM, ring), 0.0
    try:
        left, _ = signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-6))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # of whoever else set one
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds: median, and the fifth and four fifths of the repeats."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how long things run."""

    device: str
    dtype: torch.dtype
    size: int
    deadline: float

    def time(self, work: Callable[[], object]) -> Timing:
        """On a GPU by device events, caches flushed between repeats (triton.testing.do_bench); on a CPU the clock."""
        if self.device == "cuda":
            from triton.testing import do_bench

            low, median, high = do_bench(work, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
            return Timing(median=median, low=low, high=high)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            seconds.append(1e3 * (time.perf_counter() - start))
        return Timing(median=statistics.median(seconds), low=min(seconds), high=max(seconds))

    def inputs(self, heads: int, tokens: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """q, k, v, then do, `[1, T, H, D]`, and slopes of a middle layer (every 64 / H-th of its 64 heads)."""
        from minimax_train.model.lightning import decay_slopes

        g = torch.Generator(self.device).manual_seed(0)
        shape = (1, tokens, heads, self.size)
        *qkv, do = (torch.randn(shape, generator=g, device=self.device, dtype=self.dtype) for _ in range(4))
        return qkv, do, decay_slopes(64, 40, 80)[:: 64 // heads].contiguous().to(self.device)


def ceilings(bench: Bench) -> dict[str, float]:
    """Bytes a second of a copy (read and written), FLOP a second of a large product."""
    n, m = (1 << 30, 8192) if bench.device == "cuda" else (1 << 20, 128)
    source, target = (torch.empty(n, dtype=torch.bfloat16, device=bench.device).normal_() for _ in range(2))
    copy = bench.time(lambda: target.copy_(source))
    a, b = (torch.randn(m, m, device=bench.device, dtype=bench.dtype) for _ in range(2))
    product = bench.time(lambda: a @ b)
    return {"bytes_per_second": 4 * n / copy.median * 1e3, "flops_per_second": 2 * m**3 / product.median * 1e3}


Operator = Callable[..., Tensor]
"""(q, k, v `[1, T, H, D]`, slopes) -> o; of "layer" (qkv `[1, T, H, 3, D]` before its SiLU, slopes) -> o."""


def arguments_of(name: str, qkv: list[Tensor]) -> list[Tensor]:
    """What an operator takes besides slopes, in memory of its own where it is packed; leaves that want a gradient."""
    return [x.detach().requires_grad_() for x in ([torch.stack(qkv, 3)] if name == "layer" else qkv)]


def ours(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    from minimax_train.kernels import lightning_triton

    cu_seqlens = torch.arange(2, dtype=torch.int32, device=q.device) * q.shape[1]
    return lightning_triton.lightning_attention(q[0], k[0], v[0], slopes, cu_seqlens, None, rows=1, final=False)[0][None]


def layer(qkv: Tensor, slopes: Tensor) -> Tensor:
    """Nothing is sent to another rank, and no document comes from one: the exchange is a table of zeros."""
    from minimax_train.kernels.lightning_steps import LocalDocuments, lightning_steps

    tokens = qkv.shape[1]
    pieces = cut_row([0, tokens], 1)
    local, flow = pieces.local(0), state_flow(pieces)
    cu_seqlens = torch.arange(2, dtype=torch.int32, device=qkv.device) * tokens
    documents = LocalDocuments(cu_seqlens=cu_seqlens, bounds=list(local.bounds), enters=local.enters, leaves=local.leaves)
    steps = lightning_steps(slopes, documents, backend="triton", dtype=qkv.dtype, head_size=qkv.shape[-1])
    assert dist.group.WORLD is not None
    passing = Passing(exchange=Gather(decay_H=slopes), flow=flow, back=flow.mirrored(), channel=Channel(dist.group.WORLD))
    return lightning_over_pieces(qkv[0], steps, passing, lambda: None)[0][None]


def _fla(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found]

    o: Tensor = chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=1.0)[0]
    return o


def _lightning_attn(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    from lightning_attn.ops import lightning_attn_func  # type: ignore[import-not-found]

    o: Tensor = lightning_attn_func(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), slopes.view(-1, 1, 1)).transpose(1, 2)
    return o


def _flash(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def operators() -> dict[str, Operator | None]:
    """Ours and the peers; None where a peer is not installed."""
    return {
        "ours": ours,
        "layer": layer,
        "fla": _fla if importlib.util.find_spec("fla") else None,
        "lightning-attn": _lightning_attn if importlib.util.find_spec("lightning_attn") else None,
        "flash attention": _flash,
    }


def row(bench: Bench, name: str, operator: Operator, heads: int, tokens: int, bandwidth: float) -> dict[str, Any]:
    """Forward, backward and both; peak memory beyond the inputs, and with them; none of it where it does not fit or the peer fails."""
    result: dict[str, Any] = {"operator": name, "heads": heads, "tokens": tokens}
    if bench.device == "cuda":
        torch.cuda.empty_cache()
    try:
        qkv, do, slopes = bench.inputs(heads, tokens)
        inputs = arguments_of(name, qkv)
        del qkv

        def back(o: Tensor, *, again: bool = False) -> None:
            torch.autograd.grad(o, inputs, do, retain_graph=again)

        def both() -> None:
            back(operator(*inputs, slopes))

        both()  # compiles and tunes, outside the clock
        base = 0
        if bench.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            both()
            result["whole_bytes"] = torch.cuda.max_memory_allocated()
            result["peak_bytes"] = result["whole_bytes"] - base
        with torch.no_grad():
            forward = bench.time(lambda: operator(*inputs, slopes))
        backward = bench.time(partial(back, operator(*inputs, slopes), again=True))
        whole = bench.time(both)
    except (torch.OutOfMemoryError, RuntimeError, TypeError, ValueError) as error:
        return result | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    floor = {"forward": 8, "backward": 14, "both": 22}
    for part, timing in (("forward", forward), ("backward", backward), ("both", whole)):
        milliseconds = floor[part] * bench.size * tokens * heads / bandwidth * 1e3
        result[part] = asdict(timing) | {"floor_ms": milliseconds, "multiple_of_floor": timing.median / milliseconds}
    return result


def errors(bench: Bench, chosen: dict[str, Operator | None]) -> dict[str, Any]:
    """Relative error of o, dq, dk, dv against fp64 on the same numbers, 8 heads, 8K tokens (flash attention computes something else)."""
    from minimax_train.kernels import lightning_attention

    qkv, do, slopes = bench.inputs(8, 8192 if bench.device == "cuda" else 96)
    exact = torch.stack(qkv, 3).cpu().double().requires_grad_()

    def truth(active: Tensor) -> list[Tensor]:
        o, _ = lightning_attention(*active.unbind(3), slopes.cpu(), backend="cpu")
        return [o.detach(), *torch.autograd.grad(o, exact, do.cpu().double())[0].unbind(3)]

    found: dict[str, Any] = {}
    for name, operator in chosen.items():
        if operator is None or name == "flash attention":
            continue
        try:
            with until(bench.deadline):
                inputs = arguments_of(name, qkv)
                o = operator(*inputs, slopes)
                gradients = torch.autograd.grad(o, inputs, do)
                results = [o.detach(), *(gradients[0].unbind(3) if name == "layer" else gradients)]
                wanted = truth(torch.nn.functional.silu(exact) if name == "layer" else exact)
        except OutOfTime:
            found[name] = "not measured: the run's minutes were over"
            continue
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        pairs = zip(("o", "dq", "dk", "dv"), results, wanted, strict=True)
        found[name] = {part: float((a.cpu().double() - b).norm() / b.norm()) for part, a, b in pairs}
    return found


def measure(bench: Bench, cases: list[tuple[int, int]], bandwidth: float, chosen: dict[str, Operator | None]) -> Iterator[dict[str, Any]]:
    """Ours and the layer at every case first, then the peers: what the minutes do not reach is said, not left out."""
    for name, operator in chosen.items():
        for heads, tokens in cases:
            where = {"operator": name, "heads": heads, "tokens": tokens}
            if operator is None:
                result = where | {"failed": "not installed"}
            elif name == "flash attention" and tokens > FLASH_LONGEST:
                result = where | {"failed": f"not timed beyond {FLASH_LONGEST:,} tokens"}
            else:
                try:
                    with until(bench.deadline):
                        result = row(bench, name, operator, heads, tokens, bandwidth)
                except OutOfTime:
                    result = where | {"failed": "not timed: the run's minutes were over"}
            both = result.get("both")
            said = f"{both['median']:.3f} ms, {both['multiple_of_floor']:.2f} x floor" if both else result["failed"]
            print(f"{name}, {heads} heads, {tokens:,} tokens: {said}", flush=True)
            yield result


def against(rows: list[dict[str, Any]], mine: dict[str, Any], peer: str) -> float | None:
    """How many times faster ours is than the peer at the same case, forward + backward."""
    same = [r for r in rows if r["operator"] == peer and (r["heads"], r["tokens"]) == (mine["heads"], mine["tokens"]) and "both" in r]
    return same[0]["both"]["median"] / mine["both"]["median"] if same and "both" in mine else None


def table(record: dict[str, Any]) -> str:
    facts, rows = record["machine"], record["rows"]
    lines = [
        "# Lightning attention on one GPU",
        "",
        f"{facts['device']}, torch {facts['torch']}, {facts['date']}. B 1, head size {record['head_size']}, {record['dtype']}; median "
        f"(20 % to 80 %) of device time. Copy {record['ceilings']['bytes_per_second'] / 1e12:.2f} TB/s, product "
        f"{record['ceilings']['flops_per_second'] / 1e12:.0f} TFLOP/s, both measured here. Floor: 8 D bytes a token and head forward, 14 D "
        "backward, at that copy bandwidth.",
        "",
        "| operator | heads | tokens | forward ms | backward ms | both ms | x floor, both | ns a token | peak GB | ours is faster by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        head = f"| {r['operator']} | {r['heads']} | {r['tokens']:,} |"
        if "both" not in r:
            lines.append(f"{head} {r['failed']} |" + " |" * 6)
            continue
        cells = [f"{r[p]['median']:.3f} ({r[p]['low']:.3f} to {r[p]['high']:.3f})" for p in ("forward", "backward", "both")]
        mine = next((m for m in rows if m["operator"] == "ours" and (m["heads"], m["tokens"]) == (r["heads"], r["tokens"])), r)
        ratio = against(rows, mine, r["operator"]) if r is not mine else None
        cells += [f"{r['both']['multiple_of_floor']:.2f}", f"{1e6 * r['both']['median'] / r['tokens']:.1f}"]
        cells += [f"{r['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in r else "", f"{ratio:.2f}x" if ratio else ""]
        lines.append(f"{head} {' | '.join(cells)} |")
    lines += ["", "Relative error against fp64, 8 heads, 8K tokens:", ""]
    lines += [f"- {name}: {json.dumps(found)}" for name, found in record["errors"].items()]
    lines += ["", "Targets:", "", *(f"- {line}" for line, _ in verdicts(rows))]
    return "\n".join(lines) + "\n"


def verdicts(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Each target in words, and whether it was measured and holds."""
    said: list[tuple[str, bool]] = []

    def say(what: str, holds: bool | None) -> None:
        said.append((f"{what}: {'not measured' if holds is None else 'holds' if holds else 'MISSED'}", bool(holds)))

    for heads, (most, least) in TARGETS.items():
        mine = [r for r in rows if r["operator"] == "ours" and r["heads"] == heads and r["tokens"] >= 32_768 and "both" in r]
        ratios = [ratio for r in mine if (ratio := against(rows, r, "fla")) is not None]
        reached = f", up to {max(r['tokens'] for r in mine):,} tokens" if mine else ""
        where = f"{heads} heads, T >= 32K{reached}"
        worst = max((r["both"]["multiple_of_floor"] for r in mine), default=None)
        per_token = [r["both"]["median"] / r["tokens"] for r in mine]
        spread = 100 * (max(per_token) / min(per_token) - 1) if len(per_token) > 1 else None
        slowest = min(ratios, default=None)
        say(f"{where}: {_figure(worst)} x floor at most (wanted: {most})", None if worst is None else worst <= most)
        say(f"{where}: time a token varies by {_figure(spread)} % (wanted: 5)", None if spread is None else spread <= 5)
        say(f"{where}: {_figure(slowest)} x faster than fla at least (wanted: {least})", None if slowest is None else slowest >= least)
    heads, tokens, most = INSIDE
    here = next((r for r in rows if (r["operator"], r["heads"], r["tokens"]) == ("ours", heads, tokens)), {})
    held, reason = here.get("whole_bytes"), f" ({here['failed']})" if "failed" in here else ""
    holds = False if "OutOfMemory" in reason else None if held is None or reason else held <= most
    figure = _figure(None if held is None else held / 1e9)
    say(f"{heads} heads, {tokens:,} tokens, forward + backward: {figure} GB{reason} (wanted: {most / 1e9:.0f})", holds)
    return said


def _figure(x: float | None) -> str:
    return "?" if x is None else f"{x:.2f}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Nanoseconds a token and head over tokens, forward + backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, heads in zip(axes, (8, 64), strict=True):
        for name in dict.fromkeys(r["operator"] for r in record["rows"]):
            points = [r for r in record["rows"] if r["operator"] == name and r["heads"] == heads and "both" in r]
            if points:
                axis.loglog(
                    [r["tokens"] for r in points], [1e6 * r["both"]["median"] / r["tokens"] / heads for r in points], "o-", label=name
                )
        floor = 22e9 * record["head_size"] / record["ceilings"]["bytes_per_second"]
        axis.axhline(floor, color="black", linestyle=":", label="memory floor")
        axis.set(title=f"{heads} heads of {record['head_size']}", xlabel="tokens")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("ns a token and head, forward + backward")
    figure.suptitle(f"Lightning attention, {record['dtype']}, {record['machine']['device']}", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.5, help="after which nothing more is measured (3.5)")
    parser.add_argument("--rehearse", metavar="DIRECTORY", type=Path, help="walk through it on a CPU; figures mean nothing; written there")
    arguments = parser.parse_args()
    rehearsing = arguments.rehearse is not None
    if not torch.cuda.is_available() and not rehearsing:
        print("no CUDA device on this machine: nothing measured, nothing written (--rehearse DIRECTORY walks through it on the CPU)")
        return 0
    if rehearsing:
        os.environ["TRITON_INTERPRET"] = "1"
    bench = Bench(
        device="cpu" if rehearsing else "cuda",
        dtype=torch.float16 if rehearsing else torch.bfloat16,
        size=64 if rehearsing else SIZE,
        deadline=time.monotonic() + 60 * arguments.minutes,
    )
    with until(bench.deadline):
        limits, chosen = ceilings(bench), operators()
    cases = [(8, 32), (8, 64), (64, 32)] if rehearsing else CASES
    with joined(Place(), "gloo", meet(Place())):  # a world of one, which nothing is sent in
        record = {
            "machine": machine(), "head_size": bench.size, "dtype": str(bench.dtype).removeprefix("torch."), "ceilings": limits,
            "errors": errors(bench, chosen), "rows": list(measure(bench, cases, limits["bytes_per_second"], chosen)),
        }  # fmt: skip
    results = arguments.rehearse if rehearsing else Path(__file__).parent / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "lightning_gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / "lightning_gpu.md").write_text(table(record))
    plot(record, results / "lightning_gpu.png")
    print(table(record))
    return 0 if rehearsing or all(holds for _, holds in verdicts(record["rows"])) else 1


if __name__ == "__main__":
    sys.exit(main())
