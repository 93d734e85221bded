"""Our lightning attention layer against transformers' MiniMaxLightningAttention: forward and backward, one thread, side by side.

    python benchmarks/lightning_layer.py [--quick]

Hidden 512, 8 heads x 64, batch 1. Writes benchmarks/results/lightning_layer.{json,md}. Both layers get the same weights and are
checked to compute the same function first.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from machine import compare, cpu_seconds, machine
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from minimax_train.engine.parts import MegatronParts, transformer_config
from minimax_train.engine.session import Session, session
from minimax_train.kernels.choice import best_backends
from minimax_train.model.config import ModelConfig
from minimax_train.model.lightning import LightningAttention
from minimax_train.model.row import Documents, Row

LENGTHS = (1024, 4096, 16_384, 65_536)
WANTED = {("fp32", 4096): 1.2, ("fp32", 16_384): 2.0, ("fp32", 65_536): 6.0}
WANTED |= {("bf16", 4096): 1.3, ("bf16", 16_384): 1.7, ("bf16", 65_536): 5.5}
WANTED_SLOPE = 1.35
LAYER, LAYERS = 3, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layers(precision: str, joined: Session) -> tuple[LightningAttention, torch.nn.Module]:
    """Both layers with the same weights."""
    config = ModelConfig(
        num_layers=LAYERS, hidden_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64, rotary_dim=64, num_experts=2,
        experts_per_token=2, expert_ffn_size=8, vocab_size=8, alpha_lightning=2.0, alpha_softmax=2.0, alpha_experts=2.0,
    )  # fmt: skip
    dtype = DTYPES[precision]
    parts = MegatronParts(
        config=transformer_config(config, joined.groups, dtype, joined.device), groups=joined.groups, device=joined.device,
        backends=best_backends(joined.device, dtype, config.head_dim),
    )  # fmt: skip
    ours = LightningAttention(config, LAYER, parts)
    kinds = ["linear_attention"] * 7 + ["full_attention"]
    native = MiniMaxConfig(hidden_size=512, num_attention_heads=8, head_dim=64, num_hidden_layers=LAYERS, layer_types=kinds)
    theirs = MiniMaxLightningAttention(native, LAYER).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
            ours.get_parameter(name).copy_(parameter)
    return ours, theirs


def one_document(tokens: int) -> Documents:
    """A row of one document; no angles, which lightning layers do not use."""
    return Documents.of(Row.of_documents([torch.zeros(tokens, dtype=torch.int64)]), (torch.empty(0), torch.empty(0)))


def agree(precision: str, joined: Session) -> float:
    """Relative error between the two layers, fp32 or bf16, over 600 tokens."""
    ours, theirs = layers(precision, joined)
    x = torch.randn(600, 512, generator=torch.Generator().manual_seed(1)).to(DTYPES[precision])
    with torch.no_grad():
        a, b = ours(x, one_document(600)), theirs(x[None], None, None)[0][0]
    return float((a - b).float().norm() / b.float().norm())


def row(precision: str, length: int, joined: Session) -> dict[str, Any]:
    """One length: both layers forward + backward, and our backward alone."""
    ours, theirs = layers(precision, joined)
    x = torch.randn(length, 512, generator=torch.Generator().manual_seed(2)).to(DTYPES[precision]).requires_grad_()
    upstream = torch.ones(length, 512, dtype=x.dtype)
    documents = one_document(length)

    def run_ours() -> None:
        ours(x, documents).backward(upstream)

    def run_theirs() -> None:
        theirs(x[None], None, None)[0].backward(upstream[None])

    def backward_alone() -> float:
        y = ours(x, documents)
        return cpu_seconds(lambda: y.backward(upstream))

    compared = compare(run_ours, run_theirs, repeats=repeats(length), warm_up=0 if length > 20_000 else 1)
    backward = statistics.median(backward_alone() for _ in range(5))  # our layer is warm by now
    return {"precision": precision, "length": length, **compared.as_dict(), "our_backward_seconds": backward}


def repeats(length: int) -> int:
    """Pairs timed at this length; transformers' backward takes up to a minute at 64K."""
    return 2 if length > 20_000 else 5 if length > 4096 else 9


def slope(rows: list[dict[str, Any]], precision: str) -> float:
    """Least-squares slope of log backward time over log length, from 4K on."""
    points = [
        (math.log(r["length"]), math.log(r["our_backward_seconds"])) for r in rows if r["precision"] == precision and r["length"] >= 4096
    ]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def table(rows: list[dict[str, Any]], slopes: dict[str, float], facts: dict[str, Any]) -> str:
    lines = [
        "# Lightning attention layer against transformers",
        "",
        f"Forward + backward, hidden 512, 8 heads x 64, CPU seconds of one thread, median (least to most). {facts['processor']}, "
        f"torch {facts['torch']}, transformers {facts['transformers']}, {facts['date']}. "
        "Repeats: 9 up to 4,096 tokens, 5 at 16,384, 2 without warm-up at 65,536. Ratio: median over pairs run back to back.",
        "",
        "| precision | tokens | ours | transformers | ratio | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [f"{r[k]['median']:.3f} ({r[k]['least']:.3f} to {r[k]['most']:.3f})" for k in ("ours", "theirs")]
        wanted = WANTED.get((r["precision"], r["length"]))
        lines.append(f"| {r['precision']} | {r['length']:,} | {cells[0]} | {cells[1]} | {r['ratio']:.2f} | {wanted or ''} |")
    lines += ["", *(f"Log-log slope of our backward time, {p}: {s:.3f} (wanted: at most {WANTED_SLOPE})." for p, s in slopes.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1K and 4K only, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    with session() as joined:
        errors = {p: agree(p, joined) for p in DTYPES}
        if errors["fp32"] > 1e-5:
            print(f"the two layers differ by {errors['fp32']:.2e} in fp32: nothing to compare", file=sys.stderr)
            return 1
        rows = []
        for length in LENGTHS[:2] if quick else LENGTHS:
            for precision in DTYPES:
                rows.append(row(precision, length, joined))
                print(f"{precision} {length}: {rows[-1]['ratio']:.2f}x", flush=True)
    if quick:
        return 0
    slopes = {p: slope(rows, p) for p in DTYPES}
    facts = machine()
    results = Path(__file__).parent / "results"
    record = {"machine": facts, "difference": errors, "rows": rows, "backward_slope": slopes}
    (results / "lightning_layer.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / "lightning_layer.md").write_text(table(rows, slopes, facts))
    print(table(rows, slopes, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
