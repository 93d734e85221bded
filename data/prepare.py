"""From documents to a token dataset on disk: shard by shard, by several processes, all or nothing."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

from data.assemble import put_together, tools_of
from data.commit import existing, finish_commit, staged
from data.corpus import Document, Source, Undecodable, find_sources
from data.dataset import TokenDataset
from data.encoder import WORTH_IT, Choice, Encoder, ReferenceEncoder, choose_encoder
from data.format import Sidecar, file_of
from data.partial import Partial, partial
from data.parts import Share, folder_of, gather, remove_parts, work_of
from data.place import Place
from data.progress import Progress
from data.reading import Bad, Batch, Record, read
from data.sample import sample_texts, text_hashes
from data.shard import Facts, write_shard
from data.slices import SLICE, Slice, cut
from data.tokenizer import Tokenizer
from data.workers import each

MEMORY_BATCH = 1 << 20
"""Characters of documents in memory that are encoded at once."""


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
    parts: int = 0,
    quiet: bool = False,
) -> Sidecar:
    """Writes PREFIX.bin, .idx, the tokenizer and the sidecar PREFIX.json from text, JSONL, Parquet and saved datasets (see `corpus`).

    Each document's ids are followed by the end-of-document id, by number: special tokens written in the text stay text. The files depend
    on the input and the tokenizer alone, not on `workers`, nor on interruptions: after a kill the same call goes on with what was finished
    (see `partial`). Where PREFIX already holds the same texts by the same tokenizer it says so and returns that sidecar; anything else
    that stands there is refused with ValueError unless `overwrite`. A bad document raises ValueError, with `skip_bad` it is counted; a
    full disk raises OSError; in both cases nothing stays. `parts`: takes over what that many calls of prepare_part have made.
    """
    prefix = Path(prefix)
    sources, size, workers = _begin(inputs, prefix, workers)
    work = _work(sources, tokenizer, key, skip_bad)
    with Progress(f"prepare {prefix}", size, quiet=quiet) as progress, partial(prefix, work, progress.say) as room:
        there = finish_commit(room.stage, prefix)
        if there is None and existing(prefix) and not overwrite:
            there = _same_work(prefix, tokenizer, sources, key, room.folder)
        if there is not None:
            progress.say(f"{prefix}: already prepared from the same texts with the same tokenizer")
            remove_parts(prefix, parts)
            return there
        gather(room, work, parts, progress.say)
        chosen = choose_encoder(tokenizer, lambda: sample_texts(sources, key, room.folder), size=size, choice=encoder, say=progress.say)
        shards = _encode(sources, tokenizer, chosen, room, progress, Share(), key=key, skip_bad=skip_bad, workers=workers)
        sidecar = put_together(room, shards, tokenizer, chosen.name)
    remove_parts(prefix, parts)
    return sidecar


def prepare_part(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    prefix: str | Path,
    share: Share,
    *,
    key: str = "text",
    overwrite: bool = False,
    skip_bad: bool = False,
    workers: int = 1,
    encoder: Choice = "auto",
    quiet: bool = False,
) -> list[Facts]:
    """Encodes the slices of `share` and leaves them for `prepare` with `parts`; their facts, in order.

    Everything else is as `prepare` has it. A part may be empty.
    """
    prefix = Path(prefix)
    sources, size, workers = _begin(inputs, prefix, workers)
    refuse_existing(prefix, overwrite=overwrite)
    work = work_of(_work(sources, tokenizer, key, skip_bad), share)
    with (
        Progress(f"prepare {share} of {prefix}", size, quiet=quiet) as progress,
        partial(prefix, work, progress.say, part=folder_of(prefix, share)) as room,
    ):
        chosen = choose_encoder(tokenizer, lambda: sample_texts(sources, key, room.folder), size=size, choice=encoder, say=progress.say)
        return _encode(sources, tokenizer, chosen, room, progress, share, key=key, skip_bad=skip_bad, workers=workers)


def refuse_existing(prefix: Path, *, overwrite: bool) -> None:
    """ValueError where PREFIX stands and is not to be replaced."""
    if existing(prefix) and not overwrite:
        names = ", ".join(path.name for path in existing(prefix))
        raise ValueError(f"{prefix}: {names} stands there already: choose another prefix, remove it, or overwrite it")


def _begin(inputs: Sequence[str | Path], prefix: Path, workers: int) -> tuple[list[Source], int, int]:
    """The sources, their bytes, and how many processes are worth it."""
    if workers < 1:
        raise ValueError(f"workers {workers}: at least 1 process has to do the work")
    sources = find_sources(inputs)
    refuse_output_among_inputs(prefix, inputs)
    size = sum(source.size for source in sources)
    return sources, size, 1 if size < WORTH_IT else workers  # small ones are done before others would have started


def write_dataset(documents: Iterable[Document | Undecodable], tokenizer: Tokenizer, prefix: Path, *, progress: Progress) -> Sidecar:
    """Encodes documents in memory, in order, and puts them in place as PREFIX, replacing what stood there; Undecodables are counted.

    Raises ValueError when none has text.
    """
    encoder = ReferenceEncoder(tokenizer)
    with staged(prefix) as folder:
        facts = write_shard(folder, 0, _records(documents, progress), encoder, tokenizer, given="", skip_bad=True)
        return put_together(Partial(folder, prefix), [facts], tokenizer, encoder.name)


def _encode(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    encoder: Encoder,
    room: Partial,
    progress: Progress,
    share: Share,
    *,
    key: str,
    skip_bad: bool,
    workers: int,
) -> list[Facts]:
    """Every slice of `share` as a shard in `room`; those that are there already are not done again. The shards' facts, in order."""
    finished = room.finished()
    if finished:
        progress.say(f"{room.prefix}: going on after {len(finished)} finished shards")

    def wanted(number: int) -> bool:
        return share.has(number) and number not in finished

    def missing() -> Iterator[Slice]:
        for piece in cut(sources, key=key, room=room.folder, wanted=wanted):
            if not wanted(piece.number):
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
    return [facts for _, facts in sorted(finished.items())]


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
        "versions": f"{tools_of(tokenizer.library)}, slices of {SLICE}",
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


def refuse_output_among_inputs(prefix: Path, inputs: Iterable[str | Path]) -> None:
    """A second run would read the first one's output."""
    target = prefix.resolve()
    for given in map(Path, inputs):
        if given.is_dir() and target.is_relative_to(given.resolve()):
            raise ValueError(f"{prefix}: lies inside the input directory {given}; choose a prefix elsewhere")
