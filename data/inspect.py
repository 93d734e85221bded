"""What is in a token dataset, for a person: a page of text, and a picture of the lengths."""

from pathlib import Path

import numpy as np

from data.dataset import TokenDataset
from data.tokenizer import Tokenizer


def inspect(prefix: str | Path, *, samples: int = 3, sample_tokens: int = 60) -> str:
    """A page about PREFIX for a person: counts, length histogram, a few documents' beginnings decoded. Raises ValueError as `open`."""
    dataset = TokenDataset.open(prefix)
    tokenizer = dataset.tokenizer()
    return "\n".join([*_counts(dataset), "", *_histogram(dataset), "", *_samples(dataset, tokenizer, samples, sample_tokens)])


def _counts(dataset: TokenDataset) -> list[str]:
    side = dataset.sidecar
    lines = [
        f"{dataset.prefix}",
        f"  documents   {side.documents:,} ({side.empty:,} empty left out, {side.duplicates:,} duplicates kept)",
        f"  tokens      {side.tokens:,} as {side.dtype}, {side.files['.bin'].bytes:,} bytes",
        f"  longest     {side.longest_tokens:,} tokens: {side.longest_document}",
        f"  vocabulary  {side.vocabulary:,} (largest id used {side.largest_token:,}), end of document {side.eod} {side.eod_token}",
        f"  tokenizer   sha256 {side.tokenizer_sha256}",
        f"  fingerprint {side.fingerprint}, written by {side.tool}" + (f", encoded by {side.encoder}" if side.encoder else ""),
    ]
    if side.inner_ends:
        lines.append(f"  inside      {side.inner_ends:,} end-of-document ids stand inside documents; boundaries are the index's")
    lines.append(
        f"  left out    {side.bad:,} bad documents" + (f", the first {len(side.skipped)}:" if side.bad > len(side.skipped) else "")
    )
    lines += [f"    {name}" for name in side.skipped]
    return lines + [f"  from        {source.documents:,} documents, {source.tokens:,} tokens: {source.given}" for source in side.sources]


def _histogram(dataset: TokenDataset) -> list[str]:
    rows = dataset.sidecar.length_histogram
    most = max(tokens for _, _, tokens in rows)
    lines = [f"  {'length below':>14} {'documents':>12} {'tokens':>16}"]
    for below, documents, tokens in rows:
        lines.append(f"  {below:>14,} {documents:>12,} {tokens:>16,}  {'#' * round(40 * tokens / most)}".rstrip())
    return lines


def _samples(dataset: TokenDataset, tokenizer: Tokenizer, samples: int, sample_tokens: int) -> list[str]:
    lines = []
    count = min(samples, dataset.documents)
    for document in np.linspace(0, dataset.documents - 1, num=count, dtype=np.int64).tolist():
        text = tokenizer.decode(dataset.tokens(document, 0, sample_tokens).tolist())
        lines.append(f"  document {document:,} ({dataset.lengths[document]:,} tokens): {text!r}")
    return lines


def draw_lengths(prefix: str | Path, file: Path) -> None:
    """Writes a PNG: documents, and tokens, by length. Raises ValueError as `TokenDataset.open`."""
    from matplotlib.figure import Figure

    dataset = TokenDataset.open(prefix)
    rows = dataset.sidecar.length_histogram
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = [f"{below // 2:,}" for below, _, _ in rows]
    for part, column, title in ((axes[0], 1, "documents"), (axes[1], 2, "tokens")):
        part.barh(names, [row[column] for row in rows], color="#4878a8")
        part.set_xlabel(title)
        part.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("length in tokens, from")
    figure.suptitle(f"{dataset.prefix.name}: {dataset.documents:,} documents, {dataset.token_count:,} tokens")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png")
