"""The files of a token dataset: PREFIX.bin, PREFIX.idx (Megatron's layout), PREFIX.tokenizer.json and the sidecar PREFIX.json.

`.bin` is the token ids of all documents, one after the other, without a header. `.idx` is little-endian without padding: magic (9 bytes),
version (u64), dtype code (u8), sequence count S (u64), document count D + 1 (u64), then S lengths in tokens (i32), S byte offsets (i64)
and D + 1 document ends counted in sequences (i64). We write one sequence per document, so S = D, but for documents of more tokens than a
length can say: those are several sequences of LONGEST_SEQUENCE tokens and the rest.
Source: megatron-core 0.16.1, core/datasets/indexed_dataset.py. It opens a file whose lengths, offsets or tokens were damaged; we do not.
"""

import dataclasses
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\0\0"
INDEX_VERSION = 1
HEAD = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
DTYPES_WRITTEN = ("uint16", "int32")
SIDECAR_FORMAT = 2
SUFFIXES = (".bin", ".idx", ".tokenizer.json", ".tokenizer.model", ".json")
"""In the order in which they are put in place (one tokenizer or the other): a dataset without its sidecar does not exist."""

LONGEST_SEQUENCE = 2**31 - 1
"""Most tokens of a sequence."""

BLOCK = 1 << 22
"""Bytes, or tokens, handled at once when a whole file is gone through."""


def file_of(prefix: str | Path, suffix: str) -> Path:
    """PREFIX + suffix, whatever dots PREFIX itself holds."""
    return Path(f"{prefix}{suffix}")


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """Megatron's rule: uint16 below 65,500 ids, else int32. (Its reader takes uint16 up to 65,536 in one mode; ours asks the index.)"""
    return np.dtype(np.uint16 if vocabulary < 65_500 else np.int32)


def index_parts(lengths: Callable[[], Iterable[NDArray[np.int64]]], dtype: np.dtype[Any]) -> Iterator[bytes]:
    """The bytes of an `.idx`, in parts. `lengths()` gives the documents' tokens (int64 [D], each at least 1) in parts, each time anew."""
    counts = [(len(part), int(_sequences(part).sum())) for part in lengths()]
    documents, sequences = sum(count for count, _ in counts), sum(count for _, count in counts)
    yield HEAD.pack(MAGIC, INDEX_VERSION, DTYPE_CODES[dtype.name], sequences, documents + 1)
    for part in lengths():
        yield _sequence_lengths(part).astype("<i4").tobytes()
    begin = 0
    for part in lengths():
        sizes = _sequence_lengths(part) * dtype.itemsize
        yield (begin + np.cumsum(sizes) - sizes).astype("<i8").tobytes()
        begin += int(sizes.sum())
    end = np.int64(0)
    yield end.astype("<i8").tobytes()
    for part in lengths():
        ends = end + np.cumsum(_sequences(part))
        yield ends.astype("<i8").tobytes()
        end = ends[-1] if len(ends) else end


def _sequences(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Into how many sequences documents of these lengths are split."""
    return -(-lengths // LONGEST_SEQUENCE)


def _sequence_lengths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    counts = _sequences(lengths)
    if not len(lengths) or counts.max() == 1:
        return lengths
    sizes = np.full(int(counts.sum()), LONGEST_SEQUENCE, np.int64)
    sizes[np.cumsum(counts) - 1] = lengths - (counts - 1) * LONGEST_SEQUENCE
    return sizes


def parse_index(content: bytes, path: Path) -> tuple[np.dtype[Any], NDArray[np.int64]]:
    """Dtype of the tokens and tokens per document (int64 [D]). Raises ValueError unless every field agrees with every other.

    A document without a sequence, which Megatron's tool writes for an empty text, has length 0.
    """
    dtype, sequences, documents = _parse_head(content, path)
    lengths = np.frombuffer(content, "<i4", sequences, HEAD.size).astype(np.int64)
    starts = np.frombuffer(content, "<i8", sequences, HEAD.size + 4 * sequences)
    ends = np.frombuffer(content, "<i8", documents, HEAD.size + 12 * sequences)
    if sequences and lengths.min() < 1:
        at = int(lengths.argmin())
        raise ValueError(f"{path}: sequence {at} has length {lengths[at]}, expected at least 1; prepare the dataset again")
    places = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    wrong = np.flatnonzero(starts != places[:-1] * dtype.itemsize)
    if len(wrong):
        raise ValueError(f"{path}: sequence {wrong[0]} starts at byte {starts[wrong[0]]}, which the lengths before it contradict")
    if documents == sequences + 1:  # one sequence per document
        wrong = np.flatnonzero(ends != np.arange(documents))
        if len(wrong):
            raise ValueError(f"{path}: document end {wrong[0]} is {ends[wrong[0]]}, expected {wrong[0]} (one sequence per document)")
        return dtype, lengths
    if ends[0] != 0 or ends[-1] != sequences or (np.diff(ends) < 0).any():
        raise ValueError(f"{path}: document ends do not go from 0 to {sequences}, the number of sequences; prepare the dataset again")
    return dtype, np.diff(places[ends])


def _parse_head(content: bytes, path: Path) -> tuple[np.dtype[Any], int, int]:
    """Dtype, number of sequences, number of document ends."""
    if len(content) < HEAD.size:
        raise ValueError(f"{path}: {len(content)} bytes, expected at least {HEAD.size}: truncated; prepare the dataset again")
    magic, version, code, sequences, documents = HEAD.unpack_from(content)
    if magic != MAGIC:
        raise ValueError(f"{path}: starts with {magic!r}, expected {MAGIC!r}: not a Megatron index")
    if version != INDEX_VERSION:
        raise ValueError(f"{path}: index version {version}, expected {INDEX_VERSION}")
    names = [name for name in DTYPES_WRITTEN if DTYPE_CODES[name] == code]
    if not names:
        allowed = " or ".join(f"{DTYPE_CODES[name]} ({name})" for name in DTYPES_WRITTEN)
        raise ValueError(f"{path}: dtype code {code}, expected {allowed}")
    expected = HEAD.size + sequences * (4 + 8) + documents * 8
    if len(content) != expected or documents < 1:
        raise ValueError(
            f"{path}: {len(content)} bytes, expected {expected} for {sequences} sequences and {documents} document ends; "
            "prepare the dataset again"
        )
    return np.dtype(names[0]), sequences, documents


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and xxh3-128 (hexadecimal) of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """What came of one input argument."""

    given: str
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What PREFIX.json says. `tokens` counts the end-of-document tokens too; lengths are in tokens.

    `source` is the xxh3-128 of the 64-bit hashes of all texts in order; `length_histogram` holds (below, documents, tokens) per power of
    two; `bad` counts the documents left out because they could not be read and `skipped` names the first of them; `duplicates` counts
    texts equal to an earlier one (they are kept), `empty` those left out because they encode to nothing; `inner_ends` counts
    end-of-document ids inside documents, which only adopted files can have.
    """

    tool: str
    source: str
    tokenizer_sha256: str
    vocabulary: int
    eod: int
    dtype: str
    documents: int
    tokens: int
    largest_token: int
    empty: int
    duplicates: int
    skipped: tuple[str, ...]
    longest_document: str
    longest_tokens: int
    length_histogram: tuple[tuple[int, int, int], ...]
    files: dict[str, FileRecord]
    bad: int = 0
    inner_ends: int = 0
    eod_token: str = ""
    encoder: str = ""
    sources: tuple[SourceRecord, ...] = ()

    @property
    def fingerprint(self) -> str:
        """xxh3-128 (hexadecimal) of what training reads: the tokens, their boundaries and the tokenizer."""
        parts = [self.files[".bin"].xxh3_128, self.files[".idx"].xxh3_128, self.tokenizer_sha256, str(self.eod)]
        return xxhash.xxh3_128_hexdigest(" ".join(parts).encode())

    def dump(self) -> str:
        """The text of PREFIX.json; its last field is a checksum over the others."""
        fields = {"format": SIDECAR_FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> "Sidecar":
        """Reads a PREFIX.json. Raises ValueError when it is missing, damaged, edited or of another format version."""
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a dataset is named by the PREFIX of PREFIX.json, .bin and .idx (see `data prepare`)")
        try:
            fields = json.loads(path.read_bytes().decode())
            checksum, version = fields.pop("checksum"), fields.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{path}: not a dataset sidecar, or damaged; prepare the dataset again") from None
        if version != SIDECAR_FORMAT:
            raise ValueError(f"{path}: sidecar format {version!r}, expected {SIDECAR_FORMAT}; prepare the dataset again")
        if checksum != _checksum({"format": version, **fields}):
            raise ValueError(f"{path}: its checksum does not hold: damaged or edited; prepare the dataset again")
        histogram = tuple((below, documents, tokens) for below, documents, tokens in fields.pop("length_histogram"))
        files = {suffix: FileRecord(**record) for suffix, record in fields.pop("files").items()}
        sources = tuple(SourceRecord(**record) for record in fields.pop("sources"))
        return cls(**{**fields, "skipped": tuple(fields["skipped"])}, length_histogram=histogram, files=files, sources=sources)


def _checksum(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())


Histogram = tuple[tuple[int, int, int], ...]


def length_histogram(lengths: NDArray[np.int32] | NDArray[np.int64]) -> Histogram:
    """(below, documents, tokens) for each power of two from the shortest to the longest document: below/2 <= length < below."""
    exponents = np.frexp(lengths.astype(np.float64))[1]  # 2**(e-1) <= length < 2**e
    documents = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=lengths)
    used = range(int(exponents.min()), len(documents)) if len(lengths) else range(0)
    return tuple((1 << e, int(documents[e]), int(tokens[e])) for e in used)


def add_histograms(one: Histogram, other: Histogram) -> Histogram:
    """That of both sets of documents."""
    rows = {below: (documents, tokens) for below, documents, tokens in one}
    for below, documents, tokens in other:
        before = rows.get(below, (0, 0))
        rows[below] = (before[0] + documents, before[1] + tokens)
    if not rows:
        return ()
    used = range(min(rows).bit_length() - 1, max(rows).bit_length())
    return tuple((1 << e, *rows.get(1 << e, (0, 0))) for e in used)


def checksum_of(path: Path) -> FileRecord:
    """Size and checksum of a file, read in blocks."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return FileRecord(bytes=size, xxh3_128=digest.hexdigest())
