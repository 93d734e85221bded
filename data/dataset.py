"""TokenDataset: a prepared dataset, memory-mapped, and whether it can be trusted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.format import BLOCK, FileRecord, Sidecar, checksum_of, file_of, parse_index
from data.tokenizer import Tokenizer, load_tokenizer


class TokenDataset:
    """Documents of token ids on disk, each ending with the end-of-document id (see `adopt` for files of Megatron's own tool).

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
        lengths = lengths[lengths > 0] if len(lengths) != sidecar.documents else lengths  # an adopted file may hold documents of nothing
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
        """The copy of the tokenizer that made the ids."""
        return file_of(self.prefix, next(suffix for suffix in self.sidecar.files if suffix.startswith(".tokenizer")))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return load_tokenizer(self.tokenizer_file, eod=self.sidecar.eod_token or None)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Ids of one document from `start` to `stop` (clipped to its length), int64 [stop - start]. ValueError: no such document."""
        if not 0 <= document < self.documents:
            raise ValueError(f"document {document}: {self.prefix} has documents 0 to {self.documents - 1}")
        first, last = int(self.offsets[document]), int(self.offsets[document + 1])
        return self.stream[first:last][start:stop].astype(np.int64)

    def blocks(self) -> Iterator[NDArray[Any]]:
        """The whole stream in order, in pieces of at most 4 Mi tokens, read from the file: pages of the map would stay in memory."""
        with file_of(self.prefix, ".bin").open("rb") as file:
            while len(block := np.fromfile(file, self.stream.dtype, BLOCK)):
                yield block


def verify(prefix: str | Path, *, tokenizer: Tokenizer | None = None) -> TokenDataset:
    """Opens PREFIX and reads all of it: checksums, pointers, ids below the vocabulary, one end-of-document id per document, at its end.

    Raises ValueError at the first thing that does not hold, or when `tokenizer` is not the one that made the ids.
    """
    dataset = TokenDataset.open(prefix, checksums=True)
    if tokenizer is not None and tokenizer.sha256 != dataset.sidecar.tokenizer_sha256:
        raise ValueError(
            f"{dataset.prefix}: made with another tokenizer (sha256 {dataset.sidecar.tokenizer_sha256[:16]}..., a copy is "
            f"{dataset.tokenizer_file.name}; the one given is {tokenizer.sha256[:16]}...): name that one, or prepare the texts again"
        )
    check_ids(dataset)
    return dataset


def check_ids(dataset: TokenDataset) -> None:
    """Raises ValueError unless 0 <= id < vocabulary throughout and the end-of-document id stands at every document's end and only there.

    In an adopted file it may stand inside documents, as often as the sidecar says.
    """
    name = file_of(dataset.prefix, ".bin")
    ends, begin, wrong = 0, 0, ""
    last = dataset.offsets[1:] - 1
    for block in dataset.blocks():
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= dataset.vocabulary:
            raise ValueError(f"{name}: token {high if low >= 0 else low}, expected 0 to {dataset.vocabulary - 1} (the vocabulary)")
        ends += int(np.count_nonzero(block == dataset.eod))
        first, stop = np.searchsorted(last, [begin, begin + len(block)])
        found = block[last[first:stop] - begin]
        if (found != dataset.eod).any() and not wrong:
            at = int(np.flatnonzero(found != dataset.eod)[0])
            wrong = f"document {first + at} ends with {found[at]}, expected the end-of-document id {dataset.eod}"
        begin += len(block)
    expected, inner = dataset.documents + dataset.sidecar.inner_ends, dataset.sidecar.inner_ends
    if ends != expected:
        meaning = f"one a document and {inner} inside" if inner else "one a document"
        wrong = f"the end-of-document id {dataset.eod} occurs {ends} times, expected {expected} ({meaning})"
    if wrong:
        raise ValueError(f"{name}: {wrong}")


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
