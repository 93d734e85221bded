"""Conversion of a model of 7 GB both ways against `cp`: throughput, memory, and SIGKILL at random points.

    python benchmarks/conversion.py [--layers 8] [--repeats 3] [--kills 10] [--work FOLDER]

The model has MiniMax-Text-01's vocabulary, layer pattern and 32 experts, and its widths divided by four (hidden 1,536, 16 heads of 128,
experts of 2,304), random weights, its tensors spread over the files as in the release, where a file mixes layers. `cp -r` copies the same
folder on the same disk and is followed by `sync`, as the converter forces its files to the disk too; the three take turns, what they read
being in the page cache and nothing else there. Memory is the
greatest sum over processes of resident memory, pages they share counted in each. Then the conversion is killed (SIGKILL, the whole process
group) at random points, called again each time, and every byte compared with an undisturbed one. Writes
benchmarks/results/conversion.{json,md}; ends with 1 where a mark is missed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from machine import machine
from process_tree import run

from minimax_train.convert.config import write_config
from minimax_train.convert.safetensors_file import header_of
from minimax_train.convert.shards import plan_shards, shard_name
from minimax_train.convert.source import INDEX
from minimax_train.convert.table import table
from minimax_train.model.config import ModelConfig, text01

CONVERT = [sys.executable, "-m", "minimax_train.cli", "convert"]
SHARD_BYTES = 500_000_000
MOST_MB = 1000
LEAST_SHARE = 0.6


def scaled(layers: int) -> ModelConfig:
    """MiniMax-Text-01 with its widths divided by four."""
    return replace(text01(), num_layers=layers, hidden_size=1536, num_attention_heads=16, num_key_value_heads=2, expert_ffn_size=2304)


def make(config: ModelConfig, folder: Path) -> int:
    """Writes the model, a tensor at a time, and returns its bytes."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=g)
    parts = [(entry, part) for entry in table(config) for part in entry.parts]
    random.Random(0).shuffle(parts)
    dtypes = [torch.float32 if entry.fp32 else torch.bfloat16 for entry, _ in parts]
    sizes = [torch.Size(part.shape).numel() * dtype.itemsize for (_, part), dtype in zip(parts, dtypes, strict=True)]
    runs = plan_shards(sizes, SHARD_BYTES)
    where = {}
    for number, held in enumerate(runs):
        name = shard_name(number, len(runs))
        with (folder / name).open("wb") as file:
            file.write(header_of([(parts[i][1].name, dtypes[i], parts[i][1].shape) for i in held]))
            for i in held:
                where[parts[i][1].name] = name
                left = torch.Size(parts[i][1].shape).numel()
                while left:
                    first = int(torch.randint(0, len(noise) // 2, (), generator=g))
                    piece = noise[first : first + left].to(dtypes[i])
                    file.write(piece.view(torch.uint8).numpy().data)
                    left -= len(piece)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(write_config(config, 1e7, "minimax_m1", "bfloat16", 10_240_000)))
    return sum(sizes)


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file, by its place."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def tensors_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every tensor's bytes."""
    from minimax_train.convert.source import open_source

    found = {}
    for name, place in open_source(folder).tensors.items():
        with place.path.open("rb") as file:
            file.seek(place.start)
            found[name] = hashlib.sha256(file.read(place.size)).hexdigest()
    return found


def killed(command: list[str], target: Path, whole_seconds: float, kills: int, expected: dict[str, str]) -> tuple[int, bool]:
    """Kills `command` at `kills` random points while it is at work, and lets it finish whenever it does; how often it finished, and
    whether every time with the expected bytes."""
    draw, met, finished, same = random.Random(1), 0, 0, True
    while True:
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        work = target.with_name(f".partial-{target.name}") / "identity.json"
        while process.poll() is None and not work.exists():
            time.sleep(0.01)
        if met < kills:
            try:
                process.wait(draw.uniform(0.0, 0.6) * whole_seconds)
            except subprocess.TimeoutExpired:
                met += not target.exists()
                os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == 0:
            finished, same = finished + 1, same and digests(target) == expected
            fresh(target)
            if met == kills:
                return finished, same


def only_cached(work: Path, reads: Path) -> None:
    """Of the files in `work`, those in `reads` are in the page cache and no others: memory is not full, and nothing comes from the disk."""
    for path in (p for p in work.rglob("*") if p.is_file()):
        with path.open("rb", buffering=0) as file:
            if reads not in path.parents:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    block = bytearray(1 << 24)
    for path in (p for p in reads.rglob("*") if p.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def fresh(path: Path) -> Path:
    """The path, with nothing there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="on the disk to measure (default: the temporary one)")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="conversion-", dir=arguments.work))
    try:
        return measure(work, arguments.layers, arguments.repeats, arguments.kills)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(work: Path, layers: int, repeats: int, kills: int) -> int:
    """Everything, in `work`."""
    source, log = work / "source", work / "log"
    size = make(scaled(layers), source)
    print(f"{size / 1e9:.2f} GB in {len(list(source.iterdir())) - 2} files", flush=True)
    usages: dict[str, list[dict[str, float]]] = {"cp": [], "from-hf": [], "to-hf": []}
    settings = {"OMP_NUM_THREADS": "1"}
    for repeat in range(repeats):
        commands = {
            "cp": ["sh", "-c", f"cp -r {source} {fresh(work / 'copy')} && sync"],
            "from-hf": [*CONVERT, "from-hf", str(source), "--to", str(fresh(work / "checkpoint"))],
            "to-hf": [*CONVERT, "to-hf", str(work / "checkpoint"), "--to", str(fresh(work / "export")), "--shard-mb", "500"],
        }
        for name, command in commands.items():
            subprocess.run(["sync"], check=True)
            reads = work / ("checkpoint" if name == "to-hf" else "source")
            only_cached(work, reads)
            usages[name].append(asdict(run(command, environment=settings, log=log)))
            print(repeat, name, usages[name][-1], flush=True)
            fresh(work / "copy")
    bare = run([sys.executable, "-c", "import time; time.sleep(0.5)"], environment=settings, log=log).peak_mb
    identical = tensors_of(source) == tensors_of(work / "export")
    finished, same = {}, True
    for name in ("from-hf", "to-hf"):
        kept, command = work / ("checkpoint" if name == "from-hf" else "export"), commands[name]
        undisturbed = kept.rename(work / f"undisturbed-{name}")
        command = (
            [part.replace(str(work / "checkpoint"), str(work / "undisturbed-from-hf")) for part in command] if name == "to-hf" else command
        )
        seconds = statistics.median(u["wall_seconds"] for u in usages[name])
        finished[name], right = killed(command, kept, seconds, kills, digests(undisturbed))
        same = same and right
        print(f"{name}: killed {kills} times at work, finished {finished[name]} times; same bytes: {right}", flush=True)
    found = {
        "machine": machine(), "bytes": size, "usages": usages, "interpreter_mb": bare, "round_trip_identical": identical,
        "kills": kills, "finished": finished, "same_bytes_after_kills": same,
    }  # fmt: skip
    text, missed = told(found)
    print(text)
    results = Path(__file__).parent / "results"
    (results / "conversion.json").write_text(json.dumps(found, indent=1) + "\n")
    (results / "conversion.md").write_text(text)
    for line in missed:
        print(f"MISSED: {line}", file=sys.stderr)
    return 1 if missed else 0


def told(found: dict[str, Any]) -> tuple[str, list[str]]:
    """The table, and the marks that were missed."""
    facts, size, missed = found["machine"], found["bytes"], []
    seconds = {name: statistics.median(u["wall_seconds"] for u in usages) for name, usages in found["usages"].items()}
    lines = [
        "# Conversion against cp",
        "",
        f"{size / 1e9:.2f} GB of bf16 weights with fp32 routers, {facts['cores']} cores ({facts['processor']}), torch {facts['torch']}, "
        f"{facts['date']}. Median of {len(found['usages']['cp'])} (least to most), in turn, everything on the disk at the end.",
        "",
        "| | seconds | GB/s | of cp's | CPU s | peak memory over the interpreter's, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, usages in found["usages"].items():
        wall, share = [u["wall_seconds"] for u in usages], seconds["cp"] / seconds[name]
        memory = max(u["peak_mb"] for u in usages) - found["interpreter_mb"]
        cpu = statistics.median(u["cpu_seconds"] for u in usages)
        lines.append(
            f"| {name} | {seconds[name]:.1f} ({min(wall):.1f} to {max(wall):.1f}) | {size / 1e9 / seconds[name]:.2f} | {share:.0%} "
            f"| {cpu:.1f} | {f'{memory:.0f}' if name != 'cp' else ''} |"
        )
        if name != "cp" and share < LEAST_SHARE:
            missed.append(f"{name}: {share:.0%} of cp's throughput (wanted: {LEAST_SHARE:.0%})")
        if name != "cp" and memory > MOST_MB:
            missed.append(f"{name}: {memory:.0f} MB over the interpreter's (wanted: {MOST_MB})")
    finished = " and ".join(f"{name} {times} times" for name, times in found["finished"].items())
    lines += [
        "",
        f"Every tensor of the export has the bytes of the source: {'yes' if found['round_trip_identical'] else 'NO'}. Killed (SIGKILL) at "
        f"{found['kills']} random points each while at work and called again, {finished} through to the end: every file with the bytes "
        f"of an undisturbed run: {'yes' if found['same_bytes_after_kills'] else 'NO'}.",
    ]
    if not (found["round_trip_identical"] and found["same_bytes_after_kills"]):
        missed.append("bytes differ")
    return "\n".join(lines) + "\n", missed


if __name__ == "__main__":
    sys.exit(main())
