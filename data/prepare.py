"""From documents to a token dataset on disk: shard by shard, by several processes, all or nothing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.commit import existing, finish_commit, staged
from data.corpus import Document, Source, Undecodable, find_sources
from data.dataset import TokenDataset, check_ids
from data.encoder import WORTH_IT, Choice, Encoder, ReferenceEncoder, choose_encoder
from data.format import Sidecar, SourceRecord, add_histograms, checksum_of, file_of, index_parts, length_histogram, token_dtype
from data.partial import Partial, partial
from data.place import Place, names_of
from data.progress import Progress
from data.reading import Bad, Batch, Record, read
from data.sample import sample_texts, text_hashes
from data.shard import NAMED, Columns, Facts, files_of, read_columns, write_shard
from data.slices import SLICE, Slice, cut
from data.tokenizer import Tokenizer
from data.workers import each

MEMORY_BATCH = 1 << 20
"""Characters of documents in memory that are encoded at once."""

HASHES = 1 << 24
"""Hashes of texts held at once while duplicates are counted."""


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    key: str = "text",
    overwrite: bool = False,
    skip_bad: bool = False,
    workers: int = 1,
    encoder: Choice = "auto",
    quiet: bool = False,
) -> Sidecar:
    """Writes PREFIX.bin, .idx, the tokenizer and the sidecar PREFIX.json from text, JSONL, Parquet and saved datasets (see `corpus`).

    Each document's ids are followed by the end-of-document id, by number: special tokens written in the text stay text. The files depend
    on the input and the tokenizer alone, not on `workers`, nor on interruptions: after a kill the same call goes on with what was finished
    (see `partial`). Where PREFIX already holds the same texts by the same tokenizer it says so and returns that sidecar; anything else
    that stands there is refused with ValueError unless `overwrite`. A bad document raises ValueError, with `skip_bad` it is counted; a
    full disk raises OSError; in both cases nothing stays.
    """
    prefix = Path(prefix)
    if workers < 1:
        raise ValueError(f"workers {workers}: at least 1 process has to do the work")
    sources = find_sources(inputs)
    _refuse_output_among_inputs(prefix, inputs)
    size = sum(source.size for source in sources)
    if size < WORTH_IT:
        workers = 1  # done before others would have started
    work = _work(sources, tokenizer, key, skip_bad)
    with Progress(f"prepare {prefix}", size, quiet=quiet) as progress, partial(prefix, work, progress.say) as room:
        there = finish_commit(room.stage, prefix)
        if there is None and existing(prefix) and not overwrite:
            there = _same_work(prefix, tokenizer, sources, key, room.folder)
        if there is not None:
            progress.say(f"{prefix}: already prepared from the same texts with the same tokenizer")
            return there
        chosen = choose_encoder(tokenizer, lambda: sample_texts(sources, key, room.folder), size=size, choice=encoder, say=progress.say)
        shards = _encode(sources, tokenizer, chosen, room, progress, key=key, skip_bad=skip_bad, workers=workers)
        return _put_together(room, shards, tokenizer, chosen.name)


def write_dataset(documents: Iterable[Document | Undecodable], tokenizer: Tokenizer, prefix: Path, *, progress: Progress) -> Sidecar:
    """Encodes documents in memory, in order, and puts them in place as PREFIX, replacing what stood there; Undecodables are counted.

    Raises ValueError when none has text.
    """
    encoder = ReferenceEncoder(tokenizer)
    with staged(prefix) as folder:
        facts = write_shard(folder, 0, _records(documents, progress), encoder, tokenizer, given="", skip_bad=True)
        return _put_together(Partial(folder, prefix), [facts], tokenizer, encoder.name)


def _encode(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    encoder: Encoder,
    room: Partial,
    progress: Progress,
    *,
    key: str,
    skip_bad: bool,
    workers: int,
) -> list[Facts]:
    """Every slice as a shard in `room`; those that are there already are not done again. The shards' facts, in order."""
    finished = room.finished()
    if finished:
        progress.say(f"{room.prefix}: going on after {len(finished)} finished shards")

    def missing() -> Iterator[Slice]:
        for piece in cut(sources, key=key, room=room.folder, wanted=lambda number: number not in finished):
            if piece.number in finished:
                progress.passed(piece.size)
            else:
                yield piece

    def encode(piece: Slice) -> tuple[Facts, int]:
        given = piece.parts[0].source.given
        facts = write_shard(room.folder, piece.number, read(piece, key), encoder, tokenizer, given=given, skip_bad=skip_bad)
        for path in piece.unpacked:
            path.unlink()
        return facts, piece.size

    for facts, size in each(encode, missing(), workers=workers):
        finished[facts.number] = facts
        progress.advance(size, facts.tokens)
    return [finished[number] for number in range(len(finished))]


def _put_together(room: Partial, shards: list[Facts], tokenizer: Tokenizer, encoder: str) -> Sidecar:
    """The shards as one dataset at PREFIX, after a look at what is on disk now, not at what we meant to write."""
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
        tool=_tool(tokenizer.library),
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


def _records(documents: Iterable[Document | Undecodable], progress: Progress) -> Iterator[Record]:
    """Documents in memory as `reading` gives them from files."""
    batch: list[Document] = []
    for document in documents:
        if isinstance(document, Document):
            batch.append(document)
        if batch and (isinstance(document, Undecodable) or sum(held.size for held in batch) >= MEMORY_BATCH):
            yield _batch(batch)
            batch = []
        if isinstance(document, Undecodable):
            yield Bad(place=Place(path=document.source), why="not UTF-8")
        progress.advance(document.size)
    if batch:
        yield _batch(batch)


def _batch(documents: list[Document]) -> Batch:
    return Batch(texts=[document.text for document in documents], places=[Place(path=document.source) for document in documents])


def _work(sources: Sequence[Source], tokenizer: Tokenizer, key: str, skip_bad: bool) -> dict[str, str]:
    """What must be the same for shards of an earlier, interrupted call to be of use."""
    digest = xxhash.xxh3_128()
    for source in sources:
        files = sorted(source.path.glob("*")) if source.kind == "dataset" else [source.path]
        for stat in (path.stat() for path in files):
            digest.update(f"{source.given}\0{source.path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return {
        "inputs": digest.hexdigest(),
        "tokenizer": f"{tokenizer.sha256} {tokenizer.eod}",
        "key": key,
        "skip_bad": str(skip_bad),
        "versions": f"{_tool(tokenizer.library)}, slices of {SLICE}",
    }


def _same_work(prefix: Path, tokenizer: Tokenizer, sources: Sequence[Source], key: str, room: Path) -> Sidecar:
    """The sidecar of what stands at PREFIX when it is this very work; else ValueError."""
    names = ", ".join(path.name for path in existing(prefix))
    choice = "choose another prefix, remove it, or overwrite it"
    if not file_of(prefix, ".json").exists():
        raise ValueError(f"{prefix}: {names} stands there without a sidecar (not ours, or interrupted while being replaced): {choice}")
    try:
        there = TokenDataset.open(prefix, checksums=True).sidecar
    except ValueError as error:
        raise ValueError(f"{prefix} exists and is damaged ({error}): {choice}") from None
    if (there.tokenizer_sha256, there.eod) != (tokenizer.sha256, tokenizer.eod):
        raise ValueError(f"{prefix} exists, prepared with another tokenizer: {choice}")
    if there.source != text_hashes(sources, key, room):
        raise ValueError(f"{prefix} exists, prepared from other texts: {choice}")
    return there


def _refuse_output_among_inputs(prefix: Path, inputs: Iterable[str | Path]) -> None:
    """A second run would read the first one's output."""
    target = prefix.resolve()
    for given in map(Path, inputs):
        if given.is_dir() and target.is_relative_to(given.resolve()):
            raise ValueError(f"{prefix}: lies inside the input directory {given}; choose a prefix elsewhere")


def _tool(library: str) -> str:
    return ", ".join(f"{name} {_version(name)}" for name in ("minimax-train", library))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
