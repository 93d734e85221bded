"""Shards put together: one dataset with its sidecar, checked on disk before it is put in place."""

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.dataset import TokenDataset, check_ids
from data.format import Sidecar, SourceRecord, add_histograms, checksum_of, file_of, index_parts, length_histogram, token_dtype
from data.partial import Partial
from data.place import names_of
from data.shard import NAMED, Columns, Facts, files_of, read_columns
from data.tokenizer import Tokenizer

HASHES = 1 << 23
"""Hashes of texts held at once while duplicates are counted."""


def put_together(room: Partial, shards: list[Facts], tokenizer: Tokenizer, encoder: str) -> Sidecar:
    """The shards as one dataset at PREFIX, after a look at what is on disk now, not at what we meant to write.

    Raises ValueError when there is no document.
    """
    dtype = token_dtype(tokenizer.vocabulary)
    if not sum(facts.documents for facts in shards):
        empty, bad = sum(facts.empty for facts in shards), sum(facts.bad for facts in shards)
        raise ValueError(f"{room.prefix}: no text to prepare ({empty} empty documents, {bad} that could not be read)")

    def columns() -> Iterator[Columns]:
        for facts in shards:
            yield read_columns(files_of(room.folder, facts.number)[1])

    room.join(len(shards))
    with file_of(room.stage, ".idx").open("wb") as index:
        index.writelines(index_parts(lambda: (part.lengths for part in columns()), dtype))
    file_of(room.stage, tokenizer.suffix).write_bytes(tokenizer.content)
    digest = xxhash.xxh3_128()
    for part in columns():
        digest.update(part.hashes.tobytes())
    named = [pair for facts in shards for pair in facts.named][:NAMED]
    longest = max(shards, key=lambda facts: facts.longest_tokens)  # the first of several
    sidecar = Sidecar(
        tool=tools_of(tokenizer.library),
        source=digest.hexdigest(),
        tokenizer_sha256=tokenizer.sha256,
        vocabulary=tokenizer.vocabulary,
        eod=tokenizer.eod,
        dtype=dtype.name,
        documents=sum(facts.documents for facts in shards),
        tokens=sum(facts.tokens for facts in shards),
        largest_token=max(tokenizer.eod, *(facts.largest_token for facts in shards)),
        empty=sum(facts.empty for facts in shards),
        duplicates=_duplicates(columns),
        skipped=tuple(f"{name}: {why}" for name, (_, why) in zip(names_of(place for place, _ in named), named, strict=True)),
        longest_document=longest.longest.name(),
        longest_tokens=longest.longest_tokens,
        length_histogram=reduce(add_histograms, (length_histogram(part.lengths) for part in columns()), ()),
        files={suffix: checksum_of(file_of(room.stage, suffix)) for suffix in (".bin", ".idx", tokenizer.suffix)},
        bad=sum(facts.bad for facts in shards),
        eod_token=tokenizer.eod_token,
        encoder=encoder,
        sources=_sources(shards),
    )
    file_of(room.stage, ".json").write_text(sidecar.dump())
    check_ids(TokenDataset.open(room.stage))
    room.commit()
    return sidecar


def _duplicates(columns: Callable[[], Iterable[Columns]]) -> int:
    """Texts equal to an earlier one, by 64-bit hash; empty texts are not counted. Holds about HASHES hashes at once."""
    total = sum(len(part.hashes) for part in columns())
    groups = -(-total // HASHES)
    empty = xxhash.xxh3_64_intdigest(b"")
    found = 0
    for group in range(groups):
        parts = [part.hashes[(part.hashes % groups == group) & (part.hashes != empty)] for part in columns()]
        hashes: NDArray[Any] = np.concatenate(parts)
        found += len(hashes) - len(np.unique(hashes))
    return found


def _sources(shards: list[Facts]) -> tuple[SourceRecord, ...]:
    totals: dict[str, tuple[int, int]] = {}
    for facts in shards:
        documents, tokens = totals.get(facts.given, (0, 0))
        totals[facts.given] = (documents + facts.documents, tokens + facts.tokens)
    return tuple(SourceRecord(given=given, documents=documents, tokens=tokens) for given, (documents, tokens) in totals.items())


def tools_of(library: str) -> str:
    """What made a dataset: our version and that of the tokenizer's library."""
    return ", ".join(f"{name} {_version(name)}" for name in ("minimax-train", library))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
