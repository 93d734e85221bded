"""A training step on one row of 262,144 tokens: four context ranks against one, and memory that grows by tokens of a rank.

    python benchmarks/long_context.py [--quick]

A tiny hybrid model (7 lightning layers, 1 softmax; 4 heads of 16, so that one rank's activations fit into a laptop), fp32, five long
documents that begin nowhere near a piece's border. Forward, backward, gradient norm and optimizer step, once on one rank with four threads
and once on four gloo ranks with one thread each: exit 1 where loss or gradient norm differ by more than 1e-5. Memory: the most a fresh
process ever held (VmHWM) less that of a process which only builds the model; on one rank also for a row as long as a rank's part.
`--quick`: rows 16 times shorter, nothing written. Writes benchmarks/results/long_context.{json,md}.
"""

import argparse
import json
import os
import statistics
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lightning_cpu import peak
from machine import machine

from minimax_train.engine.session import session
from minimax_train.engine.trainer import Trainer
from minimax_train.model.config import ModelConfig, deepnorm_alpha
from minimax_train.model.row import Row
from minimax_train.plan import Data, LearningRate, Plan, Stage
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place

LENGTHS = (65_536, 131_072, 262_144)
RANKS = 4
TOLERANCE = 1e-5
SHARES = (0.45, 0.25, 0.15, 0.1, 0.05)
"""Of the row, each document."""


def plan(length: int) -> Plan:
    alpha = deepnorm_alpha(8)
    model = ModelConfig(
        num_layers=8,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rotary_dim=16,
        num_experts=4,
        experts_per_token=2,
        expert_ffn_size=24,
        vocab_size=256,
        alpha_lightning=alpha,
        alpha_softmax=alpha,
        alpha_experts=alpha,
    )
    stage = Stage(name="long", length=length, rope_base=1e6, tokens=length, batch_tokens=length, learning_rate=LearningRate(peak=1e-3))
    return Plan(name="long", device="cpu", precision="fp32", model=model, data=Data(train="", validation=""), stages=(stage,))


def packed(tokens: int) -> Row:
    """Documents of made-up tokens, each more often its neighbours' than chance would have it, so that there is something to learn."""
    g = torch.Generator().manual_seed(0)
    ids = (torch.randint(0, 256, (tokens,), generator=g) * torch.rand(tokens, generator=g)).long()
    ends = [round(share * tokens) // 2 * 2 + 1 for share in accumulate(SHARES)][:-1]
    documents = list(ids.tensor_split(ends))
    labels = torch.cat([torch.cat([document[1:], document.new_tensor([-100])]) for document in documents])
    return Row.of_documents(documents).with_labels(labels)


def on_rank(place: Place, tokens: int, threads: int) -> dict[str, Any]:
    """One step of the row's part on this rank, or with 0 tokens none; and the most bytes this process held."""
    torch.set_num_threads(threads)
    layout = Layout(context=place.size)
    with session(layout=layout, place=place) as joined:
        trainer = Trainer(plan(max(tokens, LENGTHS[0])), joined)
        if not tokens:
            return {"peak": peak()}
        row = packed(tokens).cut(layout, place.rank)
        start, cpu = time.perf_counter(), time.process_time()
        report = trainer.step([row], 1e-3)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        return {"loss": report.loss, "grad_norm": report.grad_norm, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak()}


def measure(ranks: int, threads: int, tokens: int) -> dict[str, Any]:
    """Memory is that of the rank that needs most, seconds of the slowest."""
    idle = max(one["peak"] for one in run_ranks(ranks, on_rank, 0, threads))
    results = run_ranks(ranks, on_rank, tokens, threads)
    print(f"{ranks} rank(s), {tokens:,} tokens: {max(one['seconds'] for one in results):.0f} s", flush=True)
    return {
        "ranks": ranks,
        "threads": threads,
        "tokens": tokens,
        **{name: results[0][name] for name in ("loss", "grad_norm")},
        **{name: max(one[name] for one in results) for name in ("seconds", "cpu_seconds")},
        "bytes": max(one["peak"] for one in results) - idle,
        "bytes_of_ranks": [one["peak"] - idle for one in results],
        "model_only": idle,
    }


def line(several: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of a rank as a straight line in its tokens, and the furthest a length lies off it."""
    tokens, extra = [one["tokens"] / one["ranks"] for one in several], [one["bytes"] for one in several]
    each, fixed = statistics.linear_regression(tokens, extra)
    off = max(abs(bytes_ / (fixed + each * t) - 1) for t, bytes_ in zip(tokens, extra, strict=True))
    return {"bytes_per_token": each, "fixed_bytes": fixed, "furthest_off": off}


def table(
    part: dict[str, Any],
    one: dict[str, Any],
    several: list[dict[str, Any]],
    fitted: dict[str, float],
    differences: dict[str, float],
    facts: Any,
) -> str:
    longest = several[-1]
    lines = [
        f"# One row of {longest['tokens']:,} tokens on {RANKS} context ranks",
        "",
        "Tiny hybrid model (8 layers: 7 lightning, 1 softmax; hidden 32, 4 heads of 16, 2 key-value heads, 4 experts of 24), fp32, "
        f"{len(SHARES)} documents of {', '.join(f'{share:.0%}' for share in SHARES)} of the row: one step with gradients. "
        f"{facts['processor']}, {facts['cores']} cores that others used too (load {facts['load'][0]:.1f} before, {facts['load'][1]:.1f} "
        f"after: seconds say little), torch {facts['torch']}, gloo, {facts['date']}.",
        "",
        "| ranks x threads | tokens | tokens a rank | loss | gradient norm | memory of the fullest rank, MiB | bytes a token | seconds | "
        "CPU seconds of the busiest rank |",
        "|---" * 9 + "|",
    ]
    for r in (part, one, *several):
        mine = r["tokens"] // r["ranks"]
        lines.append(
            f"| {r['ranks']} x {r['threads']} | {r['tokens']:,} | {mine:,} | {r['loss']:.7f} | {r['grad_norm']:.7f} | "
            f"{r['bytes'] / 2**20:,.0f} | {r['bytes'] / mine:,.0f} | {r['seconds']:.0f} | {r['cpu_seconds']:.0f} |"
        )
    lines += [
        "",
        f"{RANKS} ranks against one at {longest['tokens']:,} tokens: loss differs by {differences['loss']:.1e} of itself, the gradient "
        f"norm by {differences['grad_norm']:.1e} (allowed: {TOLERANCE:.0e}).",
        "",
        f"Memory on {RANKS} ranks: {fitted['bytes_per_token']:,.0f} bytes for each token of a rank + {fitted['fixed_bytes'] / 2**20:.0f} "
        f"MiB, no length further off this line than {fitted['furthest_off']:.1%}. The fullest of {RANKS} ranks needs "
        f"{longest['bytes'] / one['bytes']:.1%} of what one rank needs for the whole row, and {longest['bytes'] / part['bytes']:.1%} of "
        f"what one rank alone needs for a row as long as a part.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rows 16 times shorter, nothing written")
    quick = parser.parse_args().quick
    lengths = [length // 16 for length in LENGTHS] if quick else LENGTHS
    before = os.getloadavg()[0]
    several = [measure(RANKS, 1, tokens) for tokens in lengths]
    part, one = measure(1, 1, lengths[-1] // RANKS), measure(1, RANKS, lengths[-1])
    differences = {name: abs(several[-1][name] / one[name] - 1) for name in ("loss", "grad_norm")}
    facts = machine() | {"load": [before, os.getloadavg()[0]]}
    fitted = line(several)
    text = table(part, one, several, fitted, differences, facts)
    print(text)
    if not quick:
        results = Path(__file__).parent / "results"
        record = {"machine": facts, "part": part, "one": one, "several": several, "differences": differences, "fit": fitted}
        (results / "long_context.json").write_text(json.dumps(record, indent=1) + "\n")
        (results / "long_context.md").write_text(text)
    return 1 if max(differences.values()) > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())
