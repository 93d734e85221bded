"""Rows of a million tokens out of memory-mapped token files: how many a second one core assembles, and what planning a window costs.

    python benchmarks/data_rows.py

The file is written here: int32 ids as MiniMax's vocabulary of 200,064 takes them, documents of log-normal lengths, 2,000 to a row.
Assembling is timed on the rows of one window, once read (what a disk does is not measured), by one thread, in turn with the same row made
by one gather of all its tokens. Planning is timed for a whole window of 2^26 tokens. Writes benchmarks/results/data_rows.{json,md}.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from machine import compare, machine, measure

from data.batches import NOTHING_TO_PREDICT, assemble
from data.dataset import TokenDataset
from data.mixture import Shares
from data.packing import Packing, plan_window
from data.sampler import ROWS_AHEAD, Batching, Bookmark, Sampler
from data.stream import Pieces, Stream
from data.views import of_length

LENGTH, ROWS, DOCUMENTS = 2**20, 16, 2000
VOCABULARY, EOD = 200_064, 200_020
PACKINGS: tuple[Packing, ...] = ("concat", "best_fit")


def drawn_lengths(tokens: int, mean: float) -> np.ndarray:
    """Log-normal (sigma 1.3), at least 2, with about that sum and mean."""
    draw = np.random.Generator(np.random.Philox(0))
    return np.maximum(2, draw.lognormal(np.log(mean) - 1.3**2 / 2, 1.3, int(tokens / mean)).astype(np.int64))


def dataset_of(lengths: np.ndarray, stream: np.ndarray) -> TokenDataset:
    sidecar = SimpleNamespace(vocabulary=VOCABULARY, eod=EOD, largest_token=VOCABULARY - 1)
    return TokenDataset(Path("drawn"), cast(Any, sidecar), lengths, stream)


def gathered(dataset: TokenDataset, pieces: Pieces, length: int) -> tuple[np.ndarray, ...]:
    """Tokens, labels and positions of a row by indexing: the plain form, for rows that the pieces fill or nearly fill."""
    sizes = pieces.sizes
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], sizes)
    tokens = dataset.stream[positions + np.repeat(dataset.offsets[pieces.documents] + pieces.starts, sizes)].astype(np.int64)
    assert tokens.min() >= 0 and tokens.max() < dataset.vocabulary
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[bounds[1:] - 1] = NOTHING_TO_PREDICT
    return tokens, labels, positions


def measure_rows(packing: Packing, folder: Path) -> dict[str, Any]:
    """Assembling every row of one window, ours and by a gather."""
    lengths = drawn_lengths(LENGTH * ROWS, LENGTH / DOCUMENTS)
    path = folder / f"{packing}.bin"
    np.random.Generator(np.random.Philox(1)).integers(0, EOD, int(lengths.sum()), dtype=np.int32).tofile(path)
    dataset = dataset_of(lengths, np.asarray(np.memmap(path, np.int32, mode="r")))
    window = plan_window(Stream(of_length(dataset), 0), 0, length=LENGTH, packing=packing, window_tokens=2**26)
    rows = [window.row(number) for number in range(window.rows)]

    def make(form: Any) -> None:
        for pieces in rows:
            form(dataset, pieces, LENGTH)

    compared = compare(lambda: make(assemble), lambda: make(gathered), repeats=7)
    return {
        "packing": packing,
        "rows": len(rows),
        "pieces_per_row": float(np.mean([len(pieces) for pieces in rows])),
        "efficiency": float(window.tokens.mean()) / LENGTH,
        "split_documents": int(window.split.sum()),
        **compared.as_dict(),
    }


def measure_sampler(packing: Packing) -> dict[str, Any]:
    """Every row a mixture of four sources gives, one thread doing everything: turns, plans, rows."""
    lengths = drawn_lengths(LENGTH * ROWS, LENGTH / DOCUMENTS)
    view = of_length(dataset_of(lengths, np.zeros(int(lengths.sum()), np.int32)))
    begin, base, late = ([Fraction(w, 100) for w in weights] for weights in ((30, 70, 0, 0), (35, 35, 30, 0), (30, 30, 30, 10)))
    shares = Shares(begin, base, late, ramp=Fraction(10_000), late_from=100_000)
    names = ("short", "medium", "long", "qa")
    batching = Batching(length=LENGTH, packing=packing, window_tokens=2**26)
    bookmarks = {name: Bookmark() for name in names}
    rows = Sampler(dict.fromkeys(names, view), shares, batching, seed=0, bookmarks=bookmarks)

    def take() -> None:
        for _ in range(2 * ROWS):
            next(rows)

    return {"packing": packing, "rows": 2 * ROWS, "seconds": asdict(measure(take, repeats=5))}


def measure_plan(packing: Packing, length: int, tokens: int) -> dict[str, Any]:
    """Planning one window; every repeat shuffles its epoch anew. No token is read."""
    lengths = drawn_lengths(tokens, 1000)
    dataset = dataset_of(lengths, np.empty(0, np.int32))
    view = of_length(dataset)

    def plan() -> Any:
        return plan_window(Stream(view, 0), 0, length=length, packing=packing, window_tokens=tokens)

    window = plan()
    return {
        "packing": packing,
        "length": length,
        "tokens": window.end,
        "documents": len(lengths),
        "efficiency": float(window.tokens.mean()) / length,
        "split_documents": int(window.split.sum()),
        "seconds": asdict(measure(plan, repeats=5)),
    }


def per_second(timing: dict[str, Any], rows: int) -> str:
    """Rows a second: median (least to most)."""
    return f"{rows / timing['median']:.0f} ({rows / timing['most']:.0f} to {rows / timing['least']:.0f})"


def table(rows: list[dict[str, Any]], samplers: list[dict[str, Any]], plans: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# Rows of a million tokens",
        "",
        f"Rows of {LENGTH:,} tokens, about {DOCUMENTS:,} documents each, that one core assembles in a second of CPU time (one thread):",
        f"median (least to most) of 7 rounds over all rows. {facts['processor']}, numpy {np.__version__}, Python {facts['python']},",
        f"{facts['date']}. The file's pages are in memory. In a run `data.workers` threads do this ahead of training,",
        f"{ROWS_AHEAD} rows each.",
        "",
        "| packing | pieces a row | filled up | documents split | rows a second | by one gather | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['packing']} | {r['pieces_per_row']:,.0f} | {1 - r['efficiency']:.2%} | {r['split_documents']} "
            f"| {per_second(r['ours'], r['rows'])} | {per_second(r['theirs'], r['rows'])} | {r['ratio']:.2f} |"
        )
    inline = ", ".join(f"{s['packing']} {per_second(s['seconds'], s['rows'])}" for s in samplers)
    lines += [
        "",
        f"With turns of four sources and all plans in the same thread (`data.workers: 0`), rows a second: {inline}.",
        "",
        "Planning one window, CPU seconds, median (least to most) of 5; documents of 1,000 tokens in the mean. A thread does it while the",
        "window before is read.",
        "",
        "| packing | row length | window tokens | documents | filled up | documents split | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        t = p["seconds"]
        lines.append(
            f"| {p['packing']} | {p['length']:,} | {p['tokens']:,} | {p['documents']:,} | {1 - p['efficiency']:.2%} "
            f"| {p['split_documents']:,} | {t['median']:.3f} ({t['least']:.3f} to {t['most']:.3f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure_rows(packing, Path(folder)) for packing in PACKINGS]
        samplers = [measure_sampler(packing) for packing in PACKINGS]
    sizes = [(length, 2**26) for length in (8192, 131_072, LENGTH)] + [(8192, 2**25), (8192, 2**27)]
    plans = [measure_plan(packing, length, tokens) for packing in PACKINGS for length, tokens in sizes]
    facts = machine() | {"numpy": np.__version__}
    results = Path(__file__).parent / "results"
    (results / "data_rows.json").write_text(
        json.dumps({"machine": facts, "rows": rows, "samplers": samplers, "plans": plans}, indent=1) + "\n"
    )
    (results / "data_rows.md").write_text(table(rows, samplers, plans, facts))
    print(table(rows, samplers, plans, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
