"""The context grows: a small hybrid finds keys at 8 times the length it was trained at, once it has been extended to it, and not before.

    python benchmarks/context_extension.py [--to DIRECTORY] [--seeds 3] [--short] [--keep]

For each seed: trains the first stage of recipes.tiny:retrieval through the command line and counts right answers from
its length to 8 times that (`evaluate needle`); from that checkpoint every arm of extension_arms.py, with as many tokens each, and counts
again. Exit 1 where in any seed the staged arm misses a mark at the longest length, or the first stage is not learnt. Runs stay in DIRECTORY
(runs/extension); --keep goes on with those that are there. Writes benchmarks/results/context_extension.{json,md,png}; --short, one seed of
one extension with fewer keys, prints alone.
"""

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from extension_arms import Size, extended, pretrained
from extension_words import draw, missed, page
from machine import machine

from data.retrieval import Vocabulary
from minimax_train.plan import LearningRate, Mixture, Plan, Stage
from minimax_train.recipe import load_plan

FIRST_SEED = 11
"""Marks, plan and what counts as learnt were chosen on runs with seeds 1 to 3: these are others."""
GAIN, AFTER = 0.3, 0.6
"""Marks of the staged arm at the longest length, in every seed: points more than before, and the share right."""


def whole() -> Size:
    """Every arm, to 8 times the length."""
    plan = load_plan("recipes.tiny:retrieval")
    batch, rate = plan.stages[0].batch_tokens, plan.stages[0].learning_rate
    first = replace(plan.stages[0], tokens=2000 * batch, learning_rate=replace(rate, decay_tokens=800 * batch))
    plan = replace(plan, stages=(first, *plan.stages[1:]))
    return Size(plan=plan, lengths=tuple(stage.length for stage in plan.stages), samples=16, learnt=0.8)


def short() -> Size:
    """One jump of 4 times, fewer words: what a minute allows. Documents of 64 are packed to rows of 1,024, in which none sees another."""
    plan: Plan = load_plan("recipes.tiny:retrieval")
    rate = LearningRate(peak=3e-3, warmup_steps=20, final=3e-4, decay_tokens=143_360)
    stages = (
        Stage(
            name="64",
            length=1024,
            rope_base=10_000.0,
            tokens=716_800,
            batch_tokens=2048,
            learning_rate=rate,
            mixture=Mixture(weights={"64": 1.0}),
        ),
        Stage(
            name="256",
            length=1024,
            rope_base=100_000.0,
            tokens=163_840,
            batch_tokens=2048,
            learning_rate=replace(rate, warmup_steps=5, decay_tokens=61_440),
            mixture=Mixture(weights={"64": 0.5, "256": 0.5}),
        ),
    )
    sources = dict(zip(("64", "256"), plan.data.sources.values(), strict=False))
    plan = replace(plan, model=replace(plan.model, vocab_size=48), data=replace(plan.data, sources=sources), stages=stages)
    return Size(
        plan=plan,
        vocabulary=Vocabulary(keys=16, values=16, filler=13),
        tokens_a_key=16,
        arms=("staged",),
        lengths=(64, 256),
        samples=16,
        learnt=0.6,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", metavar="DIRECTORY", type=Path, default=Path("runs/extension"), help="where runs go (runs/extension)")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="how many (3)")
    parser.add_argument("--short", action="store_true", help="one seed, one stage, writes no results")
    parser.add_argument("--keep", action="store_true", help="do not run again what is there")
    arguments = parser.parse_args()
    begin, load = time.monotonic(), os.getloadavg()[0]
    size, seeds = (short(), range(1, 2)) if arguments.short else (whole(), range(FIRST_SEED, FIRST_SEED + arguments.seeds))
    if not arguments.keep:
        shutil.rmtree(arguments.to, ignore_errors=True)
    with ThreadPoolExecutor(2) as pool:  # each thread waits for a process of one thread
        outcomes = list(pool.map(lambda seed: pretrained(size, arguments.to, seed), seeds))
        asked = [(seed, arm) for arm in size.arms for seed in seeds]
        outcomes += pool.map(lambda one: extended(size, arguments.to, *one), asked)
    facts = machine() | {"load": load, "minutes": (time.monotonic() - begin) / 60}
    wrong = missed(outcomes, size.lengths[-1], gain=GAIN, after=AFTER)
    wanted = (
        f"Wanted of `staged` at {size.lengths[-1]:,}, in every seed: {100 * GAIN:.0f} points more than before, and {AFTER:.0%} at least"
    )
    text = page(outcomes, size, facts, f"{wanted}: {'; '.join(wrong) or 'met'}.")
    print(text)
    if not arguments.short:
        results = Path(__file__).parent / "results"
        written = {"machine": facts, "marks": {"gain": GAIN, "after": AFTER}, "outcomes": [asdict(outcome) for outcome in outcomes]}
        (results / "context_extension.json").write_text(json.dumps(written, indent=1) + "\n")
        (results / "context_extension.md").write_text(text)
        (results / "context_extension.png").write_bytes(draw(outcomes, size))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
