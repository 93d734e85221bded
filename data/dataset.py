"""TokenDataset: a prepared dataset, memory-mapped, and whether it can be trusted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.format import BLOCK, FileRecord, Sidecar, checksum_of, file_of, parse_index
from data.tokenizer import Tokenizer, load_tokenizer


class TokenDataset:
    """Documents of token ids on disk, each ending with the end-of-document id.

    `lengths` (int64 [D]) are tokens per document, `offsets` (int64 [D+1]) the places in `stream` where documents start (the last: where
    the stream ends), `stream` ([N], the file's own dtype, read-only, memory-mapped) all documents one after the other.
    """

    def __init__(self, prefix: Path, sidecar: Sidecar, lengths: NDArray[np.int64], stream: NDArray[Any]) -> None:
        self.prefix = prefix
        self.sidecar = sidecar
        self.lengths = lengths
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self.stream = stream

    @classmethod
    def open(cls, prefix: str | Path, *, checksums: bool = False) -> "TokenDataset":
        """Opens PREFIX and holds its files against each other and against the sidecar; with `checksums` also every byte of `.bin`.

        Always checked: sizes, the whole `.idx` (its pointers and its checksum), dtype and counts. Raises ValueError, naming the file, what
        was found and what was expected, when a file is missing, truncated or damaged.
        """
        prefix = Path(prefix)
        sidecar = Sidecar.load(file_of(prefix, ".json"))
        for suffix, record in sidecar.files.items():
            _check_size(file_of(prefix, suffix), record)
        index = file_of(prefix, ".idx")
        dtype, lengths = parse_index(index.read_bytes(), index)
        if dtype.name != sidecar.dtype:
            raise ValueError(f"{index}: says {dtype.name}, {prefix}.json says {sidecar.dtype}; prepare the dataset again")
        found = (len(lengths), int(lengths.sum()), int(lengths.sum()) * dtype.itemsize)
        expected = (sidecar.documents, sidecar.tokens, sidecar.files[".bin"].bytes)
        if found != expected:
            raise ValueError(f"{index}: (documents, tokens, bytes of .bin) = {found}, expected {expected}; prepare the dataset again")
        for suffix, record in sidecar.files.items():
            if suffix == ".idx" or checksums:
                _check_content(file_of(prefix, suffix), record)
        # a plain array over the map: slices of numpy.memmap cost microseconds each
        stream = np.asarray(np.memmap(file_of(prefix, ".bin"), dtype=dtype, mode="r"))
        return cls(prefix, sidecar, lengths, stream)

    @property
    def documents(self) -> int:
        """Number of documents, D."""
        return len(self.lengths)

    @property
    def token_count(self) -> int:
        """Number of tokens, N, end-of-document tokens included."""
        return len(self.stream)

    @property
    def vocabulary(self) -> int:
        """Ids are below this: the tokenizer's greatest id + 1."""
        return self.sidecar.vocabulary

    @property
    def eod(self) -> int:
        """The id that ends every document."""
        return self.sidecar.eod

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; changes with any token, boundary or the tokenizer. A resumed run compares it."""
        return self.sidecar.fingerprint

    @property
    def tokenizer_file(self) -> Path:
        """The copy of the tokenizer.json that made the ids."""
        return file_of(self.prefix, ".tokenizer.json")

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Ids of one document from `start` to `stop` (clipped to its length), int64 [stop - start]. ValueError: no such document."""
        if not 0 <= document < self.documents:
            raise ValueError(f"document {document}: {self.prefix} has documents 0 to {self.documents - 1}")
        first, last = int(self.offsets[document]), int(self.offsets[document + 1])
        return self.stream[first:last][start:stop].astype(np.int64)

    def blocks(self) -> Iterator[NDArray[Any]]:
        """The whole stream in order, in pieces of at most 4 Mi tokens."""
        for start in range(0, self.token_count, BLOCK):
            yield self.stream[start : start + BLOCK]


def verify(prefix: str | Path) -> TokenDataset:
    """Opens PREFIX and reads all of it: checksums, pointers, ids below the vocabulary, one end-of-document id per document, at its end.

    Raises ValueError at the first thing that does not hold.
    """
    dataset = TokenDataset.open(prefix, checksums=True)
    check_ids(dataset)
    return dataset


def check_ids(dataset: TokenDataset) -> None:
    """Raises ValueError unless 0 <= id < vocabulary throughout and the end-of-document id stands at every document's end and only there."""
    name = file_of(dataset.prefix, ".bin")
    ends = 0
    for block in dataset.blocks():
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= dataset.vocabulary:
            raise ValueError(f"{name}: token {high if low >= 0 else low}, expected 0 to {dataset.vocabulary - 1} (the vocabulary)")
        ends += int(np.count_nonzero(block == dataset.eod))
    if ends != dataset.documents:
        raise ValueError(f"{name}: the end-of-document id {dataset.eod} occurs {ends} times, expected {dataset.documents} (one a document)")
    last = dataset.stream[dataset.offsets[1:] - 1]
    if (last != dataset.eod).any():
        at = int(np.flatnonzero(last != dataset.eod)[0])
        raise ValueError(f"{name}: document {at} ends with {last[at]}, expected the end-of-document id {dataset.eod}")


def inspect(prefix: str | Path, *, samples: int = 3, sample_tokens: int = 60) -> str:
    """A page about PREFIX for a person: counts, length histogram, a few documents' beginnings decoded. Raises ValueError as `open`."""
    dataset = TokenDataset.open(prefix)
    tokenizer = load_tokenizer(dataset.tokenizer_file)
    return "\n".join([*_counts(dataset), "", *_histogram(dataset), "", *_samples(dataset, tokenizer, samples, sample_tokens)])


def _counts(dataset: TokenDataset) -> list[str]:
    side = dataset.sidecar
    lines = [
        f"{dataset.prefix}",
        f"  documents   {side.documents:,} ({side.empty:,} empty left out, {side.duplicates:,} duplicates kept)",
        f"  tokens      {side.tokens:,} as {side.dtype}, {side.files['.bin'].bytes:,} bytes",
        f"  longest     {side.longest_tokens:,} tokens: {side.longest_document}",
        f"  vocabulary  {side.vocabulary:,} (largest id used {side.largest_token:,}), end of document {side.eod}",
        f"  tokenizer   sha256 {side.tokenizer_sha256}",
        f"  fingerprint {side.fingerprint}, written by {side.tool}",
        f"  not UTF-8   {len(side.skipped):,} files left out",
    ]
    return lines + [f"    {name}" for name in side.skipped]


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


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected {record.bytes} bytes; prepare the dataset again")
    size = path.stat().st_size
    if size != record.bytes:
        raise ValueError(f"{path}: {size} bytes, expected {record.bytes}: truncated or replaced; prepare the dataset again")


def _check_content(path: Path, record: FileRecord) -> None:
    found = checksum_of(path).xxh3_128
    if found != record.xxh3_128:
        raise ValueError(f"{path}: xxh3-128 {found}, expected {record.xxh3_128}: its content was damaged; prepare the dataset again")
