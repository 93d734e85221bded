"""The main job end to end on this machine's CPU: prepare, train through three lengths, judge, export, check, report, find needles.

    python benchmarks/demo.py [--to RUN] [--ranks N]

Runs the command line as a user would, then loads the export in stock transformers. Ends with a table; exit status 1 where a mark
is missed. `make demo` calls it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from context_extension import GAIN, short
from extension_arms import Outcome, extended, pretrained
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

RECIPE = "recipes.tiny:stdlib"
SAME_FUNCTION = 2e-6
BELOW_UNIGRAM = 1.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the closing table."""

    what: str
    value: str
    mark: str = ""
    good: bool = True


@contextmanager
def step(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


def verb(*arguments: object, threads: int = 1) -> None:
    """One call of the command line; its output is shown as it comes."""
    command = [sys.executable, "-m", "minimax_train.cli", *map(str, arguments)]
    print(f"   $ minimax-train {' '.join(map(str, arguments))}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def figures(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    facts = json.loads((run / "run.json").read_text())
    speeds: dict[str, list[float]] = {}
    for line in lines:
        if "loss" in line:
            speeds.setdefault(line["stage"], []).append(line["tokens_per_second"])
    medians = {stage: sorted(values)[len(values) // 2] for stage, values in speeds.items()}
    return {"validation": validation[-1], "unigram": facts["unigram_entropy"], "speeds": medians, "tokens": lines[-1]["tokens"]}


def compare_with_transformers(run: Path, export: Path, prefix: Path) -> float:
    """||ours - theirs|| / ||theirs|| of the logits over 2,048 held-out tokens, fp32."""
    ids = torch.from_numpy(np.fromfile(prefix.with_name(prefix.name + ".bin"), np.uint16)[-2048:].astype(np.int64))[None]
    asked, answered = export.parent / "input_ids.safetensors", export.parent / "logits.safetensors"
    answered.unlink(missing_ok=True)
    save_file({"input_ids": ids}, asked)
    verb("logits", run, "--input-ids", asked, "--to", answered, "--dtype", "float32", threads=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(ids, use_cache=False, attention_mask=torch.ones_like(ids)).logits
    return float((load_file(answered)["logits"] - theirs).norm() / theirs.norm())


def generate(export: Path) -> str:
    """48 tokens by stock transformers, greedily. Without its cache, whose decoding is wrong when layer 0 is lightning."""
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer.encode("import os\nimport sys\n\n\ndef main(").ids])
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False, use_cache=False, pad_token_id=0
    )
    return str(tokenizer.decode(made[0].tolist()))


def found(before: Outcome, after: Outcome) -> list[Line]:
    """The share of keys found at each length; at the longest the extension must have brought something."""
    lines = []
    for length in before.right:
        old, new, last = before.at(length), after.at(length), length == max(before.right)
        value = f"{old:.0%} -> {new:.0%} ({100 * (new - old):+.0f} points)"
        mark = f">= {100 * GAIN:+.0f} points" if last else ""
        lines.append(Line(what=f"needles found at {length:,}", value=value, mark=mark, good=not last or new - old >= GAIN))
    return lines


def closing(run: Path, error: float) -> list[Line]:
    f = figures(run)
    margin = f["unigram"] - f["validation"]
    lines = [
        Line(what="tokens trained", value=f"{f['tokens']:,}"),
        Line(what="tokens/s by stage", value=", ".join(f"{stage} {speed:,.0f}" for stage, speed in f["speeds"].items())),
        Line(what="validation loss, nats", value=f"{f['validation']:.3f}"),
        Line(
            what="below the unigram entropy",
            value=f"{f['unigram']:.3f} - {f['validation']:.3f} = {margin:.3f}",
            mark=f">= {BELOW_UNIGRAM:g}",
            good=margin >= BELOW_UNIGRAM,
        ),
    ]
    for stage in json.loads((run / "evaluation" / "positions.json").read_text())["stages"]:
        for part, mark in (("inside", ""), ("beyond", "falls")):
            before, after = stage[part]["before"], stage[part]["after"]
            where = f"{stage['stage']}: {part} {stage['previous_length']:,}"
            value = f"{before:.4f} -> {after:.4f} ({after - before:+.4f})"
            lines.append(Line(what=where, value=value, mark=mark, good=not mark or after < before))
    lines.append(Line(what="logits, ours - transformers", value=f"{error:.1e}", mark=f"< {SAME_FUNCTION:g}", good=error < SAME_FUNCTION))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("runs/demo"), help="the run's folder (default: runs/demo)")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it reports the decay buffers as missing: it computes them, and they are never exported
    transformers.logging.disable_progress_bar()
    run, ranks = arguments.to, arguments.ranks
    torch.set_num_threads(2)
    begin = time.monotonic()
    with step("train: 2K -> 8K -> 32K on the Python standard library's source (prepared first)"):
        verb("train", RECIPE, "--to", run, "--ranks", ranks)
    with step("loss by position, before and after each extension"):
        verb("evaluate", "positions", run, threads=2)
    export = run / "export" / "minimax"
    with step("export to transformers' format"):
        if not export.exists():
            verb("convert", "to-hf", run, "--format", "minimax", "--to", export, "--tokenizer", "runs/data/stdlib/tokenizer.json")
    with step("the same function in stock transformers?"):
        error = compare_with_transformers(run, export, Path("runs/data/stdlib/validation"))
        print(f"   logits differ by {error:.1e} of their norm")
    with step("a little text, by transformers"):
        print("   | " + generate(export).replace("\n", "\n   | "))
    with step("report"):
        verb("report", run)
    with step("needles: a small hybrid learns to find keys in 64 tokens; then its context is extended to 256"):
        size, needles = short(), run.with_name(f"{run.name}-needles")
        before, after = pretrained(size, needles, seed=1), extended(size, needles, 1, "staged")
        needles = needles / "seed-1" / "staged"
        verb("report", needles)
    lines = [*closing(run, error), *found(before, after)]
    print(f"\n{'':34}{'measured':44}{'wanted':12}")
    for line in lines:
        print(f"{line.what:34}{line.value:44}{line.mark:12}{'' if line.good else 'MISSED'}")
    print(f"\nAll of it took {time.monotonic() - begin:.0f} s on CPU ranks (gloo): it proves arithmetic, not GPU speed.")
    print(f"Reports: {run / 'report' / 'index.html'}, and with the map of needles {needles / 'report' / 'index.html'}")
    return 0 if all(line.good for line in lines) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as failure:
        sys.exit(failure.returncode)
