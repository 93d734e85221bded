"""A synthetic run directory: three stages of a tiny model on CPU, as a trainer would have written it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

STAGES = (  # name, length, RoPE base, tokens a step, steps, tokens per second
    ("2K", 2048, 1e4, 4096, 120, 5900),
    ("8K", 8192, 5e5, 8192, 40, 5400),
    ("32K", 32768, 1e7, 32768, 10, 3700),
)
LAYERS, EXPERTS = 8, 8

PLAN = """name: tiny-stdlib
seed: 7
precision: fp32
model: {hidden: 128, layers: 8}
stages:
"""


def metrics() -> list[dict[str, Any]]:
    """Training lines, and a validation line at step 0, in the middle and at the end of each stage."""
    random = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    step = tokens = 0
    lines.append(_validation(random, step, "2K", tokens, 2048, 6.95))
    for number, (name, length, base, batch, steps, speed) in enumerate(STAGES):
        for i in range(steps):
            step, tokens = step + 1, tokens + batch
            loss = 3.35 + 3.6 * np.exp(-tokens / 110e3) + 0.25 * np.exp(-i / 8) * (number > 0) + random.normal(0, 0.11)
            pace = speed * random.normal(1, 0.03) * (0.4 if i == 0 else 1)
            lines.append(
                {"step": step, "stage": name, "tokens": tokens, "length": length, "rope_base": base, "loss": loss}
                | {
                    "auxiliary_loss": 1.02,
                    "grad_norm": 0.3 + 1.5 * np.exp(-step / 30) + random.gamma(2, 0.05),
                    "lr": 2e-3 * min(1, step / 20),
                }
                | {"tokens_per_second": pace, "mfu": None, "step_seconds": batch / pace}
                | {"expert_load_max": 1.2 + 2.5 * np.exp(-step / 25) + random.gamma(2, 0.05), "another_key": "kept out"}
                | {"router": _router(step)}
                | _sources(number, tokens)
                | _gradients(step)
                | _parts(number, loss)
            )
            if i + 1 in (steps // 2, steps):
                lines.append(_validation(random, step, name, tokens, length, loss + 0.08))
    return lines


def _router(step: int) -> dict[str, Any]:
    """Routers that get certain, the later layers first, and lose balance in the last one."""
    layer, even = np.arange(LAYERS), np.log(EXPERTS)
    entropy = even * (1 - 0.6 * (1 - np.exp(-step / 40)) * (layer + 1) / LAYERS) + np.random.default_rng(step).normal(0, 0.01, LAYERS)
    load_entropy = even - 0.05 - 0.8 * (layer == LAYERS - 1) * (1 - np.exp(-step / 60))
    dropped = np.where(layer == LAYERS - 1, 0.3, 0.04) * np.exp(-step / 80)
    return {"entropy": entropy.tolist(), "load_entropy": load_entropy.tolist(), "load_max": [1.5] * LAYERS, "dropped": dropped.tolist()}


def _sources(stage: int, tokens: int) -> dict[str, Any]:
    """Short documents alone, then by and by long ones; the rows of the last two stages are not quite full."""
    long = max(0, tokens - 491_520) // 2
    return {"sources": {"short": tokens - long, "long": long}, "epochs": {"short": (tokens - long) / 4e5, "long": long / 1e6}} | {
        "packing_efficiency": 1.0 if not stage else 0.993 + 0.001 * (tokens // 8192 % 5),
        "split_documents": 3 if not stage else 0,
    }


def _parts(stage: int, loss: float) -> dict[str, Any]:
    """Long documents come with the second stage, are easier, and have smaller gradients; one bucket is empty in the last stage."""
    source = {"short": loss + 0.1} | ({"long": loss - 0.2} if stage else {})
    length = {"1024": loss + 0.1} | ({"4096": loss} if stage == 1 else {}) | ({"16384": loss - 0.2} if stage else {})
    scaled = [{name: value / 5 for name, value in losses.items()} for losses in (source, length)]
    return {"source_loss": source, "length_loss": length, "source_gradient": scaled[0], "length_gradient": scaled[1]}


def _gradients(step: int) -> dict[str, Any]:
    """Early layers that explode for three steps at the second stage's start; two of these steps are not applied."""
    kinds = ("lightning_early", "lightning_late", "softmax", "experts", "routers", "norms", "embedding", "head")
    norms = {kind: (0.05 + 0.3 * np.exp(-step / 30)) * (1 + i / 4) * (1 + 0.1 * np.sin(step + i)) for i, kind in enumerate(kinds)}
    norms["lightning_early"] *= 40 if 121 <= step <= 123 else 1
    refused = {"reason": "gradient norm 9.1; the last 128 were 0.4 +- 0.05", "rows": {}}
    back = {"from_step": 130, "to_step": 124, "reason": "6 steps in a row were not applied", "left_out": {}}
    return {"grad_norms": norms} | ({"refused": refused} if step in (122, 123) else {}) | ({"rewound": back} if step == 125 else {})


def _validation(random: np.random.Generator, step: int, stage: str, tokens: int, length: int, loss: float) -> dict[str, Any]:
    load = random.dirichlet(np.full(EXPERTS, 30.0), size=LAYERS)
    return {"step": step, "stage": stage, "tokens": tokens, "length": length, "validation_loss": loss} | {
        "validation_tokens": 65536,
        "expert_load": load.tolist(),
    }


def positions() -> dict[str, Any]:
    """Loss by position of both extension stages: 256-wide bins; before the stage the loss climbs beyond the previous length."""
    random = np.random.default_rng(1)
    stages = []
    for (_, previous, *_), (name, length, base, *_) in zip(STAGES, STAGES[1:], strict=False):
        edges = np.arange(0, length + 1, 256)
        middle = (edges[1:] + edges[:-1]) / 2
        after = 3.2 + 1.4 * (middle / 64) ** -0.35 + random.normal(0, 0.04, middle.size)
        before = after + random.normal(0.03, 0.02, middle.size) + np.clip(np.log2(middle / previous), 0, None) * 0.55
        inside = middle < previous
        stages.append(
            {"stage": name, "previous_length": previous, "length": length, "rope_base": base, "documents": 7, "tokens": 7 * length}
            | {"edges": edges.tolist(), "count": [7 * 256] * middle.size, "before": before.tolist(), "after": after.tolist()}
            | {"inside": {"before": before[inside].mean(), "after": after[inside].mean()}}
            | {"beyond": {"before": before[~inside].mean(), "after": after[~inside].mean()}}
        )
    return {"stages": stages}


def needles() -> dict[str, Any]:
    """All three tasks: everything is found up to 16K, less and less beyond, least in the middle; a cell that was not asked for."""
    cells = []
    for number, task in enumerate(("single", "multi_key", "variables")):
        for length in (2048, 8192, 16384, 32768, 65536):
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
                right = max(0.0, 1 - max(0.0, np.log2(length / 16384)) * (0.3 + 0.4 * (depth in (0.25, 0.5))) - 0.2 * number)
                cells.append({"task": task, "length": length, "depth": depth, "samples": 20, "accuracy": right})
                cells[-1] |= {"token_accuracy": (1 + right) / 2, "loss": 2 - 2 * right}
    return {"checkpoint": "step-00000170", "step": 170, "trained_length": 32768, "rope_base": 1e7, "seed": 1, "cells": cells[:-1]}


FACTS = {"device": "cpu", "ranks": 2, "torch": "2.13.0", "megatron_core": "0.16.1", "backend": "cpu", "unigram_entropy": 5.9123} | {
    "parameters": 4_512_345,
    "active_parameters": 2_012_345,
}


def write_run(run: Path, lines: list[dict[str, Any]] | None = None, names: dict[str, str] | None = None) -> Path:
    """Writes the run into `run`; `names` renames stages everywhere."""
    (run / "evaluation").mkdir(parents=True)
    rename = names or {}
    plan = PLAN
    for name, length, base, batch, steps, _ in STAGES:
        plan += f"  - {{name: {json.dumps(rename.get(name, name))}, length: {length}, rope_base: {base}, tokens: {batch * steps}}}\n"
    (run / "plan.yaml").write_text(plan)
    renamed = [line | {"stage": rename.get(line["stage"], line["stage"])} for line in lines or metrics()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in renamed))
    places = positions()
    for stage in places["stages"]:
        stage["stage"] = rename.get(stage["stage"], stage["stage"])
    (run / "evaluation" / "positions.json").write_text(json.dumps(places))
    (run / "evaluation" / "needle.json").write_text(json.dumps(needles()))
    (run / "run.json").write_text(json.dumps(FACTS))
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(lines=None, names=None)` writes the synthetic run and returns its directory."""
    return lambda **given: write_run(tmp_path / "run", **given)


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """This module: `STAGES`, `LAYERS`, `EXPERTS`, `metrics()`, `positions()`, `needles()`, `write_run(run)`."""
    return sys.modules[__name__]
