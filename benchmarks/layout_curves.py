"""The same curve under every layout: the tiny recipe's first steps, loss by loss, on one rank and on two and four.

    python benchmarks/layout_curves.py [--to DIRECTORY] [--steps 30] [--keep]

Trains recipes.tiny:stdlib (fp32, rows of 2,048 tokens, four a step) through the command line under each layout, from the same seed, and
compares each step's loss with one rank's: exit 1 where one differs by more than 1e-4 of it. Not in `make bench`: some 15 minutes on 4
shared cores. Runs stay in DIRECTORY (runs/layouts); --keep reads those that are there. Writes
benchmarks/results/layout_curves.{json,md,png}.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import machine

from minimax_train.report import canvas
from minimax_train.report.canvas import BLUE, GREEN, INK, ORANGE, SOFT, VERMILION

RECIPE, TOLERANCE = "recipes.tiny:stdlib", 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout, by its degrees."""

    ranks: int
    degrees: Mapping[str, int]

    @property
    def name(self) -> str:
        parts = [f"{name.replace('_', ' ')} {degree}" for name, degree in self.degrees.items()]
        dense = 1
        for name in ("tensor", "context", "pipeline"):
            dense *= self.degrees.get(name, 1)
        data = [f"data {self.ranks // dense}"] if self.ranks > dense else []
        return ", ".join(parts + data) or "one rank"


CASES = (
    Case(ranks=1, degrees={}),
    Case(ranks=2, degrees={"tensor": 2}),
    Case(ranks=2, degrees={"context": 2}),
    Case(ranks=2, degrees={"pipeline": 2}),
    Case(ranks=2, degrees={"expert": 2}),
    Case(ranks=4, degrees={}),
    Case(ranks=4, degrees={"tensor": 4}),
    Case(ranks=4, degrees={"context": 2, "expert": 2, "expert_tensor": 2}),
)
STYLES = ((INK, ""), (BLUE, "v"), (ORANGE, "s"), (GREEN, "D"), (VERMILION, "o"), ("#7aa6c2", "<"), ("#b58ac9", ">"), (SOFT, "^"))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a run wrote for each step."""

    name: str
    ranks: int
    loss: list[float]
    grad_norm: list[float]
    loads: list[list[float]]
    """Of each step, the entropy of every layer's expert loads, to 5 digits."""
    seconds: float
    """Of all steps."""

    def other_choice(self, other: "Curve") -> int | None:
        """The first step, from 1, in which some expert got another number of tokens: a choice between two experts fell the other way."""
        return next((step for step, (a, b) in enumerate(zip(self.loads, other.loads, strict=True), 1) if a != b), None)

    def differences(self, other: "Curve", what: str) -> list[float]:
        """Of each step, as a share of the other's."""
        return [abs(a / b - 1) for a, b in zip(getattr(self, what), getattr(other, what), strict=True)]


def train(case: Case, folder: Path, steps: int, *, keep: bool) -> Curve:
    """A fresh run, or with `keep` the one that is there; raises where the command line fails."""
    run = folder / case.name.replace(", ", "-").replace(" ", "_")
    if not (keep and (run / "metrics.jsonl").exists()):
        shutil.rmtree(run, ignore_errors=True)
        settings = {f"layout.{name}": degree for name, degree in case.degrees.items()} | {"steps": steps, "validation.tokens": 2048}
        chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        command = [sys.executable, "-m", "minimax_train.cli", "train", RECIPE, "--to", str(run), "--ranks", str(case.ranks), *chosen]
        print("$", *command[1:], flush=True)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mine = [line for line in lines if "loss" in line]
    return Curve(
        name=case.name,
        ranks=case.ranks,
        loss=[line["loss"] for line in mine],
        grad_norm=[line["grad_norm"] for line in mine],
        loads=[line["router"]["load_entropy"] for line in mine],
        seconds=sum(line["step_seconds"] for line in mine),
    )


def draw(curves: Sequence[Curve]) -> bytes:
    """PNG: losses, and how far each layout's lie from one rank's."""
    figure = canvas.sheet(6.4, f"{RECIPE}, fp32, rows of 2,048 tokens: the same {len(curves[0].loss)} steps under every layout")
    axes = figure.subplots(1, 2)
    canvas.style(axes[0], x="step", y="loss, nats a token")
    canvas.heading(axes[0], "Loss")
    canvas.style(axes[1], x="step", y="difference from one rank, of the loss")
    canvas.heading(axes[1], "How far from one rank's loss")
    for number, (curve, (colour, marker)) in enumerate(zip(curves, STYLES, strict=True)):
        steps = range(1, len(curve.loss) + 1)
        width = 7.5 - 0.9 * number  # the first ones wide, so that all are seen where they lie on each other
        axes[0].plot(steps, curve.loss, color=colour, linewidth=width, label=curve.name, alpha=0.9)
        if number:
            off = [max(difference, 1e-9) for difference in curve.differences(curves[0], "loss")]
            axes[1].semilogy(steps, off, color=colour, marker=marker, markersize=4, linewidth=1)
    axes[1].axhline(TOLERANCE, color=INK, linestyle=":", linewidth=1)
    axes[1].annotate("allowed", (1, TOLERANCE), textcoords="offset points", xytext=(0, 4), fontsize=9, color=SOFT)
    axes[1].set_ylim(5e-10, 1e-3)  # what is less than 1e-9 is drawn there
    canvas.legend(figure, axes[0])
    return canvas.png(figure)


def table(curves: Sequence[Curve], facts: Mapping[str, Any]) -> str:
    one = curves[0]
    lines = [
        "# The same curve under every layout",
        "",
        f"{RECIPE}, fp32, its first {len(one.loss)} steps of 8,192 tokens in rows of 2,048, seed 1234, through the command line. "
        "Differences are of the same step on one rank, as a share of it: the largest of all steps "
        f"(allowed, of the loss: {TOLERANCE:.0e}). "
        f"{facts['processor']}, {facts['cores']} cores that others used too (load {facts['load']:.1f}), torch {facts['torch']}, "
        f"gloo, {facts['date']}. 0.0e+00: the same bits.",
        "",
        "Another choice: the first step in which some expert got another number of tokens than on one rank, as happens where two "
        "experts are equally good to rounding and the order of additions decides. "
        "From then on curves differ by what one token's expert makes.",
        "",
        "| layout | ranks | first loss | last loss | loss differs by | gradient norm differs by | another choice | before it, loss by | "
        "seconds |",
        "|---" * 9 + "|",
    ]
    for curve in curves:
        cells = [""] * 4
        if curve is not one:
            step = curve.other_choice(one)
            before = max(curve.differences(one, "loss")[: step and step - 1], default=0.0)
            cells = [f"{max(curve.differences(one, what)):.1e}" for what in ("loss", "grad_norm")]
            cells += [f"step {step}" if step else "none", f"{before:.1e}"]
        lines.append(
            f"| {curve.name} | {curve.ranks} | {curve.loss[0]:.6f} | {curve.loss[-1]:.6f} | {' | '.join(cells)} | {curve.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", metavar="DIRECTORY", type=Path, default=Path("runs/layouts"), help="where runs go (runs/layouts)")
    parser.add_argument("--keep", action="store_true", help="do not run again what is there")
    parser.add_argument("--steps", type=int, default=30, help="of each run (30)")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    curves = [train(case, arguments.to, arguments.steps, keep=arguments.keep) for case in CASES]
    facts = machine() | {"load": load}
    text = table(curves, facts)
    print(text)
    results = Path(__file__).parent / "results"
    (results / "layout_curves.json").write_text(json.dumps({"machine": facts, "curves": [asdict(c) for c in curves]}, indent=1) + "\n")
    (results / "layout_curves.md").write_text(text)
    (results / "layout_curves.png").write_bytes(draw(curves))
    return 1 if any(max(curve.differences(curves[0], "loss")) > TOLERANCE for curve in curves[1:]) else 0


if __name__ == "__main__":
    sys.exit(main())
