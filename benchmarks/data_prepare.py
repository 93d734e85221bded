"""Text to token files: `data prepare` against datatrove's Megatron writer, `datasets.map` and the raw encoders.

    python benchmarks/data_prepare.py [--megabytes 105] [--workers 2] [--repeats 3] [--datatrove PYTHON] [--work FOLDER]

One corpus (source and documentation files of the standard library and of the installed packages, as JSONL), one 32k byte-level BPE with
Llama 3's pattern, the same number of workers. Each tool is a process of its own; CPU seconds are those of its whole process tree, imports
and all, and the tools take turns. datatrove wants its own versions of what we pin, so it runs in a virtual environment of its own, made
here unless --datatrove names one. Then: memory at ten times the input, and opening an index of ten million documents.
Writes benchmarks/results/data_prepare.{json,md}.
"""

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from machine import machine
from process_tree import Usage, run

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(__file__).with_name("data_tools.py")
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".js", ".html"}
DATATROVE = ("datatrove==0.10.1", "orjson", "tokenizers==0.23.3")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Llama 3's
)
NAMES = {
    "ours": "**`data prepare`**",
    "raw_gigatoken": "gigatoken `encode_batch`, nothing written",
    "raw_tokenizers": "tokenizers `encode_batch`, nothing written",
    "datatrove": "datatrove MegatronDocumentTokenizer",
    "datasets_map": "datasets `map`, save_to_disk",
}
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def texts() -> Iterator[str]:
    """Every different text of the standard library and the installed packages."""
    seen = set()
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file() or path.is_symlink():
                continue
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            if text and (key := hash(text)) not in seen:
                seen.add(key)
                yield text


def write_corpus(path: Path, megabytes: float) -> int:
    """JSONL of that size, or more by a line. When the machine's texts do not reach, they come again with other letters: new words."""
    size = 0
    with path.open("wb") as file:
        for turn in count():
            table = str.maketrans(LETTERS, LETTERS[turn % 26 :] + LETTERS[: turn % 26])
            for text in texts():
                size += file.write(orjson.dumps({"text": text.translate(table) if turn else text}) + b"\n")
                if size >= megabytes * 1e6:
                    return size
    raise AssertionError("unreachable")


def write_tokenizer(path: Path, corpus: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    with corpus.open("rb") as file:
        engine.train_from_iterator((orjson.loads(line)["text"] for number, line in enumerate(file) if number % 16 == 0), trainer)
    engine.save(str(path))


def split(corpus: Path, folder: Path, parts: int) -> None:
    """One file for each of datatrove's workers; not timed."""
    folder.mkdir()
    lines = corpus.read_bytes().splitlines(keepends=True)
    for part in range(parts):
        (folder / f"{part}.jsonl").write_bytes(b"".join(lines[part * len(lines) // parts : (part + 1) * len(lines) // parts]))


def datatrove_python(given: Path | None, work: Path) -> Path:
    if given:
        return given
    home = work / "datatrove-venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    subprocess.run([str(home / "bin" / "pip"), "install", "--quiet", *DATATROVE], check=True)
    return home / "bin" / "python"


def prepare(corpus: Path, tokenizer: Path, prefix: Path, workers: int, log: Path) -> Usage:
    command = [sys.executable, "-m", "minimax_train.cli", "data", "prepare", str(corpus), "--tokenizer", str(tokenizer)]
    return run([*command, "--to", str(prefix), "--workers", str(workers), "--overwrite"], environment={"PYTHONPATH": str(ROOT)}, log=log)


def measure_tools(corpus: Path, tokenizer: Path, work: Path, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Each tool `repeats` times, in turn."""
    split(corpus, work / "split", arguments.workers)
    pythons = {"datatrove": str(datatrove_python(arguments.datatrove, work))}
    environment = {"RAYON_NUM_THREADS": str(arguments.workers), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for repeat in range(arguments.repeats):
        for name in NAMES:
            log = work / f"{name}.log"
            if name == "ours":
                usage = prepare(corpus, tokenizer, work / "ours", arguments.workers, log)
                extra = {"tokens": json.loads((work / "ours.json").read_text())["tokens"]}
            else:
                folder = work / f"{name}-{repeat}"
                folder.mkdir()
                command = [pythons.get(name, sys.executable), str(TOOLS), name, str(corpus), str(tokenizer), str(folder)]
                quiet = {"TOKENIZERS_PARALLELISM": "true" if name == "raw_tokenizers" else "false"}
                usage = run([*command, str(arguments.workers)], environment={**environment, **quiet}, log=log)
                extra = json.loads((folder / "result.json").read_text())
            found[name].append({**asdict(usage), **extra})
            print(f"{name} {repeat}: {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def measure_memory(tokenizer: Path, work: Path, workers: int, megabytes: int) -> dict[str, float]:
    corpus = work / "large.jsonl"
    size = write_corpus(corpus, megabytes)
    usage = prepare(corpus, tokenizer, work / "large", workers, work / "large.log")
    corpus.unlink()
    return {"megabytes": size / 1e6, **asdict(usage)}


def measure_opening(work: Path, tokenizer: Path, documents: int = 10_000_000, repeats: int = 3) -> dict[str, Any]:
    """Wall and CPU seconds to open an index of ten million documents: ours with every check, and megatron-core's reader without."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from data.adopt import adopt
    from data.dataset import TokenDataset
    from data.format import file_of, index_parts
    from data.tokenizer import load_tokenizer

    prefix, loaded = work / "many", load_tokenizer(tokenizer)
    lengths = np.random.default_rng(0).integers(2, 20, documents)
    stream = np.ones(int(lengths.sum()), np.uint16)
    stream[np.cumsum(lengths) - 1] = loaded.eod
    stream.tofile(file_of(prefix, ".bin"))
    with file_of(prefix, ".idx").open("wb") as index:
        index.writelines(index_parts(lambda: [lengths], stream.dtype))
    adopt(prefix, loaded)

    def timed(work: Callable[[], Any]) -> dict[str, float]:
        pairs = []
        for _ in range(repeats):
            wall, cpu = time.monotonic(), time.process_time()
            assert len(getattr(work(), "lengths", range(documents))) == documents
            pairs.append((time.monotonic() - wall, time.process_time() - cpu))
        return {"wall_seconds": statistics.median(a for a, _ in pairs), "cpu_seconds": statistics.median(b for _, b in pairs)}

    return {
        "documents": documents,
        "ours": timed(lambda: TokenDataset.open(prefix)),
        "megatron": timed(lambda: IndexedDataset(str(prefix))),
    }


def median(rows: list[dict[str, Any]], field: str) -> float:
    return float(statistics.median(row[field] for row in rows))


def table(result: dict[str, Any]) -> str:
    facts, tools, size = result["machine"], result["tools"], result["megabytes"]
    ours = median(tools["ours"], "cpu_seconds")
    lines = [
        "# Text to token files",
        "",
        f"{size:.1f} MB of JSONL ({result['documents']:,} documents, {result['tokens']:,} tokens), 32k byte-level BPE, {result['workers']} "
        f"workers, {facts['cores']} cores ({facts['processor']}), Python {facts['python']}, {facts['date']}; gigatoken "
        f"{facts['gigatoken']}, tokenizers {facts['tokenizers']}, datasets {facts['datasets']}, {DATATROVE[0].replace('==', ' ')}. "
        f"Median of {result['repeats']} (least to most), tools in turn, {result['load']:.0f} other processes wanting to run at the start: "
        "CPU seconds are of the whole process tree, imports included, and are what to compare; wall time tells of the neighbours.",
        "",
        "| tool | CPU s | MB per CPU-s | MB/s | peak memory MB | CPU s against ours |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in tools.items():
        cpu, middle = [row["cpu_seconds"] for row in rows], median(rows, "cpu_seconds")
        lines.append(
            f"| {NAMES[name]} | {middle:.2f} ({min(cpu):.2f} to {max(cpu):.2f}) | {size / middle:.1f} "
            f"| {size / median(rows, 'wall_seconds'):.2f} | {max(row['peak_mb'] for row in rows):.0f} | {middle / ours:.2f} |"
        )
    raw, encode = median(tools["raw_gigatoken"], "cpu_seconds"), median(tools["raw_gigatoken"], "encode_cpu_seconds")
    opening, memory = result["opening"], result["memory"]
    mine, theirs = opening["ours"], opening["megatron"]
    small = max(row["peak_mb"] for row in tools["ours"])
    lines += [
        "",
        "| mark | asked for | measured |",
        "|---|---|---|",
        f"| CPU seconds of datatrove / ours | at least 20 | {median(tools['datatrove'], 'cpu_seconds') / ours:.1f} |",
        f"| MB per CPU-second of ours / raw gigatoken's process | at least 50 % | {raw / ours:.0%} |",
        f"| the same, of gigatoken's calls alone ({encode:.2f} CPU-s: no start, no reading, no parsing) | - | {encode / ours:.0%} |",
        f"| peak memory, {size:,.0f} MB of input | at most 700 MB | {small:.0f} MB |",
        f"| peak memory, {memory['megabytes']:,.0f} MB ({memory['cpu_seconds']:.1f} CPU-s) | the same | {memory['peak_mb']:.0f} MB |",
        f"| an index of {opening['documents']:,} documents opens, all checks | under 2 s | {mine['wall_seconds']:.2f} s "
        f"({mine['cpu_seconds']:.2f} CPU-s; megatron-core's reader, which checks nothing: {theirs['cpu_seconds']:.2f}) |",
        "",
        "The raw encoders write nothing, append no end of document and take a literal `<|endoftext|>` for the token; datatrove does too. "
        f"Peak memory is the greatest sum of resident memory over processes. The {memory['megabytes']:,.0f} MB are the same texts again "
        "with other letters, so that no cache of words helps.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=105)
    parser.add_argument("--large", type=int, default=1050, help="megabytes of the memory measurement")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--datatrove", type=Path, metavar="PYTHON", help="an interpreter that has datatrove")
    parser.add_argument("--work", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        corpus, tokenizer = work / "corpus.jsonl", work / "tokenizer.json"
        size = write_corpus(corpus, arguments.megabytes)
        write_tokenizer(tokenizer, corpus)
        load = float(Path("/proc/loadavg").read_text().split()[0])
        result: dict[str, Any] = {"machine": {**machine(), **{name: version(name) for name in ("gigatoken", "tokenizers", "datasets")}}}
        result |= {"megabytes": size / 1e6, "workers": arguments.workers, "repeats": arguments.repeats, "load": load}
        result["tools"] = measure_tools(corpus, tokenizer, work, arguments)
        sidecar = json.loads((work / "ours.json").read_text())
        result |= {"documents": sidecar["documents"], "tokens": sidecar["tokens"]}
        result["memory"] = measure_memory(tokenizer, work, arguments.workers, arguments.large)
        result["opening"] = measure_opening(work, tokenizer)
    (arguments.results / "data_prepare.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.results / "data_prepare.md").write_text(table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
