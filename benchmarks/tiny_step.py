"""A training step of the whole tiny model against transformers' model of the same size: one thread, side by side.

    python benchmarks/tiny_step.py

Forward, backward and an AdamW step on one document of 2K, 8K and 32K tokens, fp32. Ours is the training engine as `train` runs it
(one rank, distributed optimizer, auxiliary loss); transformers' is MiniMaxForCausalLM with sdpa attention, torch's AdamW and
output_router_logits=True. Writes benchmarks/results/tiny_step.{json,md}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from machine import compare, machine
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from minimax_train.convert.config import write_config
from minimax_train.engine.session import Session, session
from minimax_train.engine.trainer import Trainer
from minimax_train.model.row import Row
from minimax_train.recipe import load_plan

LENGTHS = (2048, 8192, 32_768)


def measure_length(length: int, joined: Session) -> dict[str, Any]:
    plan = load_plan("recipes.tiny:stdlib")
    ids = torch.randint(0, plan.model.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(0))
    row = Row.of_documents([ids[:-1]]).with_labels(ids[1:])
    trainer = Trainer(plan, joined)
    raw = write_config(plan.model, 1e4, "minimax", "float32", 65_536) | {"output_router_logits": True}
    config = MiniMaxConfig(**{k: v for k, v in raw.items() if k != "model_type"}, attn_implementation="sdpa")
    theirs = MiniMaxForCausalLM(config).float().train()
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in trainer.decoder.parameters())
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def run_theirs() -> None:
        optimizer.zero_grad()
        theirs(ids[None, :-1], labels=ids[None, :-1], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()

    compared = compare(
        lambda: trainer.step([row], 1e-3), run_theirs, repeats=2 if length > 10_000 else 3, warm_up=0 if length > 10_000 else 1
    )
    return {"length": length, **compared.as_dict()}


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# Training step of the tiny model against transformers",
        "",
        f"CPU seconds of one thread, fp32, median (least to most). {facts['processor']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}, {facts['date']}. 32,768 tokens: 2 repeats, no warm-up; else 3.",
        "",
        "| tokens | ours | transformers | ratio |",
        "|---|---|---|---|",
    ]
    for r in rows:
        cells = [f"{r[k]['median']:.2f} ({r[k]['least']:.2f} to {r[k]['most']:.2f})" for k in ("ours", "theirs")]
        lines.append(f"| {r['length']:,} | {cells[0]} | {cells[1]} | {r['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    torch.set_num_threads(1)
    with session() as joined:
        rows = [measure_length(length, joined) for length in LENGTHS]
    facts = machine()
    results = Path(__file__).parent / "results"
    (results / "tiny_step.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    (results / "tiny_step.md").write_text(table(rows, facts))
    print(table(rows, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
