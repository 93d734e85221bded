"""Campaigns of faults on real ranks: how many kills, hangs, flips and hostile files there were, and how many ended as they should.

    python benchmarks/faults.py [kills] [restarts] [hangs] [healthy] [flips] [replicas] [hostile] [--short]

Without a name, all. Writes benchmarks/results/faults.{json,md}, figures of earlier campaigns in it staying; exit 1 where any trial ended
otherwise. --short: a few trials of each, and nothing is written. Everything happens on this machine: gloo ranks on its CPU, a local disk;
no GPU, no NCCL, no several nodes.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fault_hostile import hostile
from fault_ranks import Ranks, hung, losses, replica_flip
from machine import machine

from minimax_train.checkpoint.record import read_record
from minimax_train.checkpoint.shelf import checkpoints_in, newest_verified
from minimax_train.engine.replicas import checksum, odd_ones, word_sum
from minimax_train.plan import Checkpoints, Plan
from minimax_train.recipe import as_yaml
from parallel.testing import run_ranks
from tests.support import little_corpus, little_model, little_plan

RESULTS = Path(__file__).with_name("results")
Outcome = dict[str, Any]


def kills(work: Path, plan: Plan, short: bool) -> Outcome:
    """Two ranks killed together at random moments of training and saving, again and again until the run is through, then the next run.

    Right: a run goes on from its newest committed checkpoint, and its losses are those of an undisturbed run to the last bit.
    """
    plan = replace(plan, checkpoints=Checkpoints(every_steps=1, keep=2))
    undisturbed = Ranks(plan, work / "undisturbed")
    undisturbed.join()
    expected, wanted, draw = losses(work / "undisturbed"), 6 if short else 200, random.Random(9)
    done = equal = kept = in_saves = runs = 0
    while done < wanted:
        runs += 1
        run = work / f"run-{runs}"
        while done < wanted:
            committed = _newest(run)
            ranks = Ranks(plan, run)
            resumed = ranks.wait_until_begun(run)
            kept += resumed is not None and resumed == committed
            time.sleep(draw.random() * 1.5)
            in_saves += bool(list((run / "checkpoints").glob(".partial-*")))
            if not ranks.kill():
                break  # it was through
            done += 1
            equal += losses(run) == expected[: len(losses(run))]
    last = Ranks(plan, run)
    last.join()
    whole = losses(run) == expected
    return {"trials": done, "right": min(equal, kept), "runs": runs, "killed while a save was under way": in_saves, "last run equal": whole}


def _newest(run: Path) -> int:
    present = checkpoints_in(run / "checkpoints")
    return read_record(present[-1]).progress.step if present else 0


def restarts(work: Path, plan: Plan, short: bool) -> Outcome:
    """torchrun's two ranks, one killed at a random step. Right: torchrun starts them again, and the run ends with an undisturbed run's
    losses."""
    recipe = work / "plan.yaml"
    recipe.write_text(as_yaml(replace(plan, checkpoints=Checkpoints(every_steps=2, keep=2))))
    Ranks(plan, work / "undisturbed").join()
    expected, wanted, draw, right, seconds = losses(work / "undisturbed"), 2 if short else 20, random.Random(3), 0, []
    for trial in range(wanted):
        run = work / f"run-{trial}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
        command = [*launcher, "-m", "minimax_train.cli", "train", str(recipe), "--to", str(run)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        step = draw.randrange(1, len(expected) - 2)
        while len(losses(run)) < step and process.poll() is None:
            time.sleep(0.01)
        children = [int(pid) for task in Path(f"/proc/{process.pid}/task").iterdir() for pid in (task / "children").read_text().split()]
        ranks = [pid for pid in children if b"minimax_train.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        before = len(losses(run))
        os.kill(draw.choice(ranks), signal.SIGKILL)
        begin = time.monotonic()
        while len(losses(run)) <= before and process.poll() is None:
            time.sleep(0.01)
        seconds.append(time.monotonic() - begin)
        right += process.wait() == 0 and losses(run) == expected
    return {
        "trials": wanted,
        "right": right,
        "seconds until the next step, median": sorted(seconds)[len(seconds) // 2],
        "most": max(seconds),
    }


def hangs(work: Path, plan: Plan, short: bool) -> Outcome:
    """One rank of two falls asleep, is stopped, or keeps the interpreter; limit 4 s. Right: that rank is named, alone, and both leave."""
    wanted, right, seconds = 3 if short else 20, 0, []
    for trial in range(wanted):
        named, after = hung(plan, work / f"run-{trial}", culprit=trial % 2, fault=trial % 3, limit=4.0)
        right += named
        seconds.append(after)
    return {"trials": wanted, "right": right, "seconds until named, median": sorted(seconds)[len(seconds) // 2], "most": max(seconds)}


def healthy(work: Path, plan: Plan, short: bool) -> Outcome:
    """Steps of two ranks with the limit of 4 s, every hundredth followed by a save in which the first rank sleeps for 6 s. Right: nobody
    is named."""
    steps = 50 if short else 1000
    stage = replace(plan.stages[0], tokens=steps * 256)
    plan = replace(plan, stages=(stage,), checkpoints=Checkpoints(every_steps=100, keep=1))
    ranks = Ranks(plan, work / "run", slow_saves=6.0, limit=4.0)
    ranks.join()
    alarms = len(list((work / "run" / "logs").glob("hang-*")))
    return {"trials": steps, "right": len(losses(work / "run")) if not alarms else 0, "false alarms": alarms}


def flips(work: Path, plan: Plan, short: bool) -> Outcome:
    """Every byte of a small checkpoint flipped, one after the other, all bits of it. Right: it does not verify, and the one before is
    chosen."""
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rotary_dim": 4}
    small = little_model(**shape, num_experts=2, expert_ffn_size=8)
    Ranks(replace(plan, model=small, steps=2, checkpoints=Checkpoints(every_steps=1, keep=2)), work / "run", size=1).join()
    folder = work / "run" / "checkpoints"
    before, last = checkpoints_in(folder)[-2:]
    trials = right = 0
    for file in sorted(path for path in last.rglob("*") if path.is_file()):
        whole = bytearray(file.read_bytes())
        for place in range(0, len(whole), 997 if short else 1):
            with file.open("r+b") as opened:
                opened.seek(place)
                opened.write(bytes([whole[place] ^ 0xFF]))
            trials += 1
            right += newest_verified(folder)[0] == before
            with file.open("r+b") as opened:
                opened.seek(place)
                opened.write(whole[place : place + 1])
    intact = newest_verified(folder)[0] == last
    return {"trials": trials, "right": right if intact else 0}


def replicas(work: Path, plan: Plan, short: bool) -> Outcome:
    """A random bit of one of four equal tensors, in bf16 and fp32, by both checksums; the last ten of them in a step of four data-parallel
    ranks. Right: that rank is named, alone."""
    draw, wanted, right = random.Random(4), 40 if short else 1000, 0
    weights = {
        dtype: torch.randn(100_000, generator=torch.Generator().manual_seed(1)).to(dtype) for dtype in (torch.bfloat16, torch.float32)
    }
    for trial in range(wanted):
        dtype, total, bad = list(weights)[trial % 2], (checksum, word_sum)[trial // 2 % 2], draw.randrange(4)
        usual = int(total(weights[dtype]))
        flipped = weights[dtype].clone()
        words = flipped.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
        words[draw.randrange(len(words))] ^= 1 << draw.randrange(8 * dtype.itemsize - 1)
        sums = [[int(total(flipped)) if rank == bad else usual] for rank in range(4)]
        right += odd_ones(sums, range(4), ["w"]) == [f"rank {bad} of 0, 1, 2, 3 has other numbers in w"]
    real = 1 if short else 10
    for trial in range(real):
        (line,) = set(run_ranks(4, replica_flip, plan, trial % 4, trial))
        right += line.startswith(f"rank {trial % 4} of 0, 1, 2, 3 has other numbers in ")
    return {"trials": wanted + real, "right": right}


CAMPAIGNS: dict[str, Callable[[Path, Plan, bool], Outcome]] = {
    "kills": kills,
    "restarts": restarts,
    "hangs": hangs,
    "healthy": healthy,
    "flips": flips,
    "replicas": replicas,
    "hostile": hostile,
}


def page(results: dict[str, Any]) -> str:
    """The table."""
    lines = ["# Campaigns of faults", "", "| campaign | trials | as they should | besides | what |", "|---|---|---|---|---|"]
    for name, outcome in results.items():
        rest = "; ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in outcome["more"].items())
        about = " ".join((CAMPAIGNS[name].__doc__ or "").split())
        lines.append(f"| {name} | {outcome['trials']:,} | {outcome['right']:,} | {rest} | {about} |")
    at = next(iter(results.values()))["machine"]
    where = f"{at['processor']}, {at['cores']} cores, gloo ranks on its CPU and a local disk; torch {at['torch']}, {at['date']}."
    return "\n".join([*lines, "", where + " No GPU, no NCCL, no several nodes.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("campaigns", nargs="*", help=", ".join(CAMPAIGNS))
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    unknown = set(arguments.campaigns) - CAMPAIGNS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: the campaigns are {', '.join(CAMPAIGNS)}")
    path, failed = RESULTS / "faults.json", []
    results = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        plan = little_plan(little_corpus(Path(folder) / "corpus"))
        for name in arguments.campaigns or CAMPAIGNS:
            work, begin = Path(folder) / name, time.monotonic()
            work.mkdir()
            outcome = CAMPAIGNS[name](work, plan, arguments.short)
            more = {key: value for key, value in outcome.items() if key not in ("trials", "right")}
            print(
                f"{name}: {outcome['right']:,} of {outcome['trials']:,} as they should; {more}; {time.monotonic() - begin:.0f} s",
                flush=True,
            )
            results[name] = {"trials": outcome["trials"], "right": outcome["right"], "more": more, "machine": machine()}
            if outcome["right"] != outcome["trials"]:
                failed.append(name)
            if not arguments.short:
                ordered = {name: results[name] for name in CAMPAIGNS if name in results}
                path.write_text(json.dumps(ordered, indent=1) + "\n")
                path.with_suffix(".md").write_text(page(ordered))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
