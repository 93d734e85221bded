"""The runs of context_extension.py: what each arm trains on, and the command line that trains and judges it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from data.retrieval import GROWING, TOKENS_A_KEY, Vocabulary, write_lengths
from minimax_train.plan import LearningRate, Mixture, Plan, Source, Stage, Start
from minimax_train.recipe import as_yaml

MOST = 2_500_000
"""Tokens that are written for the first stage; it may go through them more than once."""
ARMS = {
    "staged": "each stage twice as long, RoPE base raised, half of the rows shorter documents: the recipe",
    "staged, RoPE base kept": "the same, at the first stage's RoPE base",
    "staged, long documents alone": "the same, every row a document of the stage's length",
    "one jump": "the last stage at once, for as many tokens as all",
    "not longer": "as many tokens again at the first length: what more training alone brings",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is hidden and asked, and how much of it there is to train on."""

    plan: Plan
    """Of all stages; the first is the pretraining."""
    vocabulary: Vocabulary = GROWING
    tokens_a_key: int = TOKENS_A_KEY
    arms: tuple[str, ...] = tuple(ARMS)
    lengths: tuple[int, ...]
    """At which needles are asked for; the first is what the pretraining has seen, the last what the extension reaches."""
    samples: int
    learnt: float
    """Share of right answers at the first length from which the first stage counts as learnt."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a stage went."""

    stage: str
    first: float
    """Gradient norm of its first step."""
    median: float
    most: float
    refused: int
    loss: tuple[float, float]
    """Of its first and last step."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: what it finds, and how its stages went."""

    seed: int
    arm: str
    right: dict[int, list[float]]
    """By length, the share of right answers at each depth."""
    depths: list[float]
    courses: list[Course]
    tokens: int
    seconds: float
    """Training alone."""

    def at(self, length: int) -> float:
        """The mean over the depths."""
        return sum(self.right[length]) / len(self.right[length])


def seeded(size: Size, folder: Path, seed: int) -> Plan:
    """The plan with this seed, on token files of this seed's own, which are written where they are missing."""
    plan, files = size.plan, folder / f"seed-{seed}" / "tokens"
    made = {int(name): -(-_needed(plan, int(name)) // int(name)) for name in plan.data.sources}
    if not (files / "validation.json").exists():
        write_lengths(files, made, seed, vocabulary=size.vocabulary, tokens_a_key=size.tokens_a_key)
    sources = {name: Source(prefix=str(files / name)) for name in plan.data.sources}
    return replace(plan, seed=seed, data=replace(plan.data, sources=sources, validation=str(files / "validation")))


def _needed(plan: Plan, length: int) -> int:
    """Tokens of documents of one length: enough that no arm sees them much more than once, nor the first stage up to MOST of its own."""
    first = plan.stages[0]
    longer = sum(stage.tokens for stage in plan.stages[1:])
    return (min(first.tokens, MOST) if str(length) in _weights(first) else 0) + longer


def _weights(stage: Stage) -> Mapping[str, float]:
    assert stage.mixture is not None
    return stage.mixture.weights


def arm_stages(plan: Plan, arm: str) -> tuple[Stage, ...]:
    """Of one arm, behind the same first stage and with as many tokens as every other."""
    first, longer = plan.stages[0], plan.stages[1:]
    if arm == "staged, RoPE base kept":
        return tuple(replace(stage, rope_base=first.rope_base) for stage in longer)
    if arm == "staged, long documents alone":
        longest = [max(_weights(stage), key=int) for stage in longer]
        return tuple(replace(stage, mixture=Mixture(weights={name: 1.0})) for stage, name in zip(longer, longest, strict=True))
    tokens = sum(stage.tokens for stage in longer)
    if arm == "one jump":
        return (replace(longer[-1], tokens=tokens),)
    if arm == "not longer":
        rate: LearningRate = longer[-1].learning_rate
        return (replace(first, name="again", tokens=tokens, batch_tokens=longer[-1].batch_tokens, learning_rate=rate),)
    return longer


def pretrained(size: Size, folder: Path, seed: int) -> Outcome:
    """The first stage, judged as it is. RuntimeError where nothing was learnt, for what is measured is what comes after. (When a model
    finds the mechanism differs by hundreds of steps between seeds and processors.)"""
    plan, run = seeded(size, folder, seed), folder / f"seed-{seed}" / "before"
    outcome = _outcome(size, replace(plan, stages=plan.stages[:1]), run, seed, "before")
    if outcome.at(size.lengths[0]) < size.learnt:
        raise RuntimeError(
            f"seed {seed}: {outcome.at(size.lengths[0]):.0%} right at the first length, {size.learnt:.0%} wanted: not learnt"
        )
    return outcome


def extended(size: Size, folder: Path, seed: int, arm: str) -> Outcome:
    """One arm, from this seed's pretrained checkpoint and with moments of its own."""
    plan, place = seeded(size, folder, seed), folder / f"seed-{seed}"
    (newest,) = sorted((place / "before" / "checkpoints").glob("step-*"))[-1:]
    plan = replace(plan, name=f"{plan.name}, {arm}", stages=arm_stages(plan, arm), start=Start(checkpoint=str(newest)))
    return _outcome(size, plan, place / arm.replace(", ", "-").replace(" ", "_"), seed, arm)


def _outcome(size: Size, plan: Plan, run: Path, seed: int, arm: str) -> Outcome:
    recipe = run.with_suffix(".yaml")
    recipe.write_text(as_yaml(plan))
    _verb("train", recipe, "--to", run)
    asked = ["--tasks", "multi_key", "--keys", f"1/{size.tokens_a_key}", "--samples", size.samples]
    _verb("evaluate", "needle", run, "--lengths", ",".join(map(str, size.lengths)), *asked)
    cells = json.loads((run / "evaluation" / "needle.json").read_text())["cells"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    return Outcome(
        seed=seed,
        arm=arm,
        right={length: [cell["accuracy"] for cell in cells if cell["length"] == length] for length in size.lengths},
        depths=[cell["depth"] for cell in cells if cell["length"] == size.lengths[0]],
        courses=[course(stage.name, [line for line in steps if line["stage"] == stage.name]) for stage in plan.stages],
        tokens=sum(line["batch_tokens"] for line in steps),
        seconds=sum(line["step_seconds"] for line in steps),
    )


def course(stage: str, steps: list[dict[str, Any]]) -> Course:
    """Of the lines that a stage's steps wrote."""
    norms = [step["grad_norm"] for step in steps]
    return Course(
        stage=stage,
        first=norms[0],
        median=median(norms),
        most=max(norms),
        refused=sum("refused" in step for step in steps),
        loss=(steps[0]["loss"], steps[-1]["loss"]),
    )


def _verb(*arguments: object) -> None:
    """One call of the command line, on one thread; raises with what it said where it fails."""
    words, begin = [str(argument) for argument in arguments], time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "minimax_train.cli", *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    print(f"{time.monotonic() - begin:4.0f} s $ minimax-train {' '.join(words)}", flush=True)
    if done.returncode:
        raise RuntimeError(f"minimax-train {' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
