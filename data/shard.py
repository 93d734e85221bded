"""A shard: the ids of one slice, on disk together with what is known of its documents, or not at all."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.encoder import Encoder
from data.format import checksum_of, token_dtype
from data.long_line import BadText
from data.long_text import encode_long
from data.place import Place
from data.reading import Bad, Batch, LongText, Record
from data.tokenizer import Tokenizer

NAMED = 100
"""Bad documents that are named; all are counted."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a shard says of itself. `bytes` and `xxh3_128` are those of its ids, `largest_token` is -1 without documents."""

    number: int
    given: str
    documents: int
    tokens: int
    bytes: int
    xxh3_128: str
    largest_token: int
    empty: int
    bad: int
    named: tuple[tuple[Place, str], ...]
    longest: Place
    longest_tokens: int


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Tokens of each document (its end included; int64 [D]) and the xxh3-64 of every text in order, empty ones too (uint64)."""

    lengths: NDArray[np.int64]
    hashes: NDArray[np.uint64]


def files_of(folder: Path, number: int) -> tuple[Path, Path]:
    """Where a shard's ids and facts are."""
    return folder / f"{number:08}.ids", folder / f"{number:08}.npz"


def write_shard(
    folder: Path, number: int, records: Iterable[Record], encoder: Encoder, tokenizer: Tokenizer, *, given: str, skip_bad: bool
) -> Facts:
    """Encodes `records` in order into shard `number` of `folder`; on return it is there, whole.

    Raises ValueError for a bad document, by its place, unless `skip_bad`, and always where text encodes to the end-of-document id or to
    an id outside the vocabulary.
    """
    ids, facts_file = files_of(folder, number)
    writing = [path.with_name(f"{path.name}.part") for path in (ids, facts_file)]
    encoder.refresh()
    with writing[0].open("wb") as binary:
        writer = _Writer(binary, encoder, tokenizer, skip_bad)
        for record in records:
            writer.take(record)
    written = checksum_of(writing[0])
    facts = Facts(
        number=number,
        given=given,
        documents=sum(map(len, writer.lengths)),
        tokens=int(sum(part.sum() for part in writer.lengths)),
        bytes=written.bytes,
        xxh3_128=written.xxh3_128,
        largest_token=writer.largest,
        empty=writer.empty,
        bad=writer.bad,
        named=tuple(writer.named),
        longest=writer.longest[0],
        longest_tokens=writer.longest[1],
    )
    with writing[1].open("wb") as file:
        np.savez(
            file,
            facts=np.frombuffer(json.dumps(asdict(facts)).encode(), np.uint8),
            lengths=np.concatenate([*writer.lengths, np.zeros(0, np.int64)]),
            hashes=np.concatenate([*writer.hashes, np.zeros(0, np.uint64)]),
        )
    writing[0].rename(ids)
    writing[1].rename(facts_file)
    return facts


def read_facts(path: Path) -> Facts:
    """Facts of a shard that `write_shard` finished. Raises ValueError for a damaged file."""
    try:
        with np.load(path) as arrays:
            fields: dict[str, Any] = json.loads(arrays["facts"].tobytes())
            fields["named"] = tuple((Place(**place), why) for place, why in fields["named"])
            return Facts(**{**fields, "longest": Place(**fields["longest"])})
    except Exception as error:  # numpy and zipfile raise whatever a damaged archive makes them meet
        raise ValueError(f"{path}: damaged ({error})") from None


def read_columns(path: Path) -> Columns:
    """The per-document columns beside the facts."""
    with np.load(path) as arrays:
        return Columns(lengths=arrays["lengths"], hashes=arrays["hashes"])


class _Writer:
    """Ids to a file, and what is counted on the way."""

    def __init__(self, binary: Any, encoder: Encoder, tokenizer: Tokenizer, skip_bad: bool) -> None:
        self.binary, self.encoder, self.tokenizer, self.skip_bad = binary, encoder, tokenizer, skip_bad
        self.dtype = token_dtype(tokenizer.vocabulary)
        self.lengths: list[NDArray[np.int64]] = []
        self.hashes: list[NDArray[np.uint64]] = []
        self.named: list[tuple[Place, str]] = []
        self.largest, self.empty, self.bad = -1, 0, 0
        self.longest = (Place(path=""), 0)

    def take(self, record: Record) -> None:
        if isinstance(record, Bad):
            self._refuse(record.place, record.why)
        elif isinstance(record, LongText):
            self._take_long(record)
        else:
            begin = 0
            for number, text in enumerate(record.texts):
                if len(text) > self.encoder.longest:
                    self._take_short(record, begin, number)
                    self._take_long(LongText(pieces=iter([text]), place=record.places[number]))
                    begin = number + 1
            self._take_short(record, begin, len(record.texts))

    def _take_short(self, batch: Batch, begin: int, end: int) -> None:
        texts = batch.texts[begin:end]
        if not texts:
            return
        self.hashes.append(np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], np.uint64))
        ids, ends = self.encoder.encode(texts)
        lengths = np.diff(ends)
        if not self._fits(ids):
            at = int(np.searchsorted(ends, self._misfit(ids), side="right")) - 1
            self._check(ids, batch.places[begin + at])
        kept = lengths > 0
        self.empty += len(texts) - int(kept.sum())
        if not kept.any():
            return
        with_ends = lengths[kept] + 1
        at = int(lengths.argmax())
        if lengths[at] + 1 > self.longest[1]:
            self.longest = (batch.places[begin + at], int(lengths[at]) + 1)
        self.lengths.append(with_ends)
        self.binary.write(_with_ends(ids, with_ends, self.tokenizer.eod, self.dtype).data)

    def _take_long(self, text: LongText) -> None:
        begin, digest, length = self.binary.tell(), xxhash.xxh3_64(), 0

        def hashed() -> Iterable[str]:
            for piece in text.pieces:
                digest.update(piece.encode())
                yield piece

        try:
            for ids in encode_long(hashed(), self.encoder):
                self._check(ids, text.place)
                self.binary.write(ids.astype(self.dtype).data)
                length += len(ids)
        except BadText as error:
            self.binary.seek(begin)
            self.binary.truncate()
            self._refuse(text.place, str(error))
            return
        self.hashes.append(np.array([digest.intdigest()], np.uint64))
        if not length:
            self.empty += 1
            return
        self.binary.write(np.array([self.tokenizer.eod], self.dtype).data)
        self.lengths.append(np.array([length + 1], np.int64))
        self.longest = max(self.longest, (text.place, length + 1), key=lambda pair: pair[1])

    def _refuse(self, place: Place, why: str) -> None:
        if not self.skip_bad:
            raise ValueError(f"{place.name()}: {why}")
        self.bad += 1
        if len(self.named) < NAMED:
            self.named.append((place, why))

    def _fits(self, ids: NDArray[np.uint32]) -> bool:
        if len(ids):
            self.largest = max(self.largest, int(ids.max()))
        return self.largest < self.tokenizer.vocabulary and not (ids == self.tokenizer.eod).any()

    def _misfit(self, ids: NDArray[np.uint32]) -> int:
        return int(np.flatnonzero((ids == self.tokenizer.eod) | (ids >= self.tokenizer.vocabulary))[0])

    def _check(self, ids: NDArray[np.uint32], place: Place) -> None:
        if self._fits(ids):
            return
        eod, vocabulary, found = self.tokenizer.eod, self.tokenizer.vocabulary, int(ids[self._misfit(ids)])
        if found >= vocabulary:
            raise ValueError(f"{place.name()}: encodes to id {found}, the tokenizer has ids 0 to {vocabulary - 1}")
        raise ValueError(
            f"{place.name()}: its text encodes to the end-of-document id {eod} in places, which would end the document "
            f"there; the tokenizer must mark {self.tokenizer.eod_token!r} as special, or another end-of-document token must be named"
        )


def _with_ends(ids: NDArray[np.uint32], lengths: NDArray[np.int64], eod: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """`ids` of documents one after the other, each followed by `eod`; `lengths` count it."""
    out = np.empty(len(ids) + len(lengths), dtype)
    if len(ids) > 64 * len(lengths):  # long documents: copying each is faster than picking tokens
        at = taken = 0
        for length in lengths.tolist():
            out[at : at + length - 1] = ids[taken : taken + length - 1]
            out[at + length - 1] = eod
            at, taken = at + length, taken + length - 1
        return out
    ends = np.cumsum(lengths) - 1
    text = np.ones(len(out), bool)
    text[ends] = False
    out[text] = ids
    out[ends] = eod
    return out
