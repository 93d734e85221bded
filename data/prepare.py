"""From documents to a token dataset on disk, all or nothing."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.commit import commit_files, existing, staged
from data.corpus import Document, Undecodable, find_files, read_documents
from data.dataset import TokenDataset, check_ids
from data.format import FileRecord, Sidecar, checksum_of, file_of, index_parts, length_histogram, token_dtype
from data.progress import Progress
from data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
"""Text encoded at once. The tokenizer's own records take some hundred bytes per token, so this bounds memory (a document is never cut)."""


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    key: str = "text",
    suffixes: Sequence[str] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Sidecar:
    """Writes PREFIX.bin, .idx, .tokenizer.json and the sidecar PREFIX.json from text files, directories and JSONL (see `corpus`).

    Each document's ids are followed by the end-of-document id, by number: special tokens written in the text stay text. Where PREFIX
    already holds the same texts by the same tokenizer it says so and returns that sidecar; anything else that stands there is refused with
    ValueError unless `overwrite`. Bad input raises ValueError, a full disk OSError; in every case nothing half-written stays.
    """
    prefix = Path(prefix)
    files = find_files(inputs, suffixes=suffixes)
    _refuse_output_among_inputs(prefix, inputs)
    total = sum(file.stat().st_size for file in files)
    with Progress(f"prepare {prefix}", total, quiet=quiet) as progress:
        if existing(prefix) and not overwrite:
            there = _same_work(prefix, tokenizer, read_documents(files, key=key))
            progress.say(f"{prefix}: already prepared from the same texts with the same tokenizer")
            return there
        return write_dataset(read_documents(files, key=key), tokenizer, prefix, progress=progress)


def write_dataset(documents: Iterable[Document | Undecodable], tokenizer: Tokenizer, prefix: Path, *, progress: Progress) -> Sidecar:
    """Encodes `documents` in order and puts them in place as PREFIX, replacing what stood there. Raises ValueError when none has text."""
    tally = _Tally()
    dtype = token_dtype(tokenizer.vocabulary)
    with staged(prefix) as folder:
        stage = folder / prefix.name
        with file_of(stage, ".bin").open("wb") as binary:
            for batch in _batches(documents, tally):
                ids = _encode(batch, tokenizer, dtype, tally)
                binary.write(ids.data)
                progress.advance(sum(document.size for document in batch))
        if not tally.lengths:
            raise ValueError(f"{prefix}: no text to prepare ({tally.empty} empty documents, {len(tally.skipped)} files that are not UTF-8)")
        with file_of(stage, ".idx").open("wb") as index:
            index.writelines(index_parts(np.array(tally.lengths, np.int32), dtype))
        file_of(stage, ".tokenizer.json").write_bytes(tokenizer.content)
        files = {suffix: checksum_of(file_of(stage, suffix)) for suffix in (".bin", ".idx", ".tokenizer.json")}
        sidecar = tally.sidecar(tokenizer, dtype, files)
        file_of(stage, ".json").write_text(sidecar.dump())
        check_ids(TokenDataset.open(stage))  # what is on disk now, not what we meant to write
        commit_files(stage, prefix)
    return sidecar


class _Tally:
    """What is counted while documents pass by: a few bytes per document."""

    def __init__(self) -> None:
        self.lengths = array("i")
        self.hashes = array("Q")
        self.source = xxhash.xxh3_128()
        self.skipped: list[str] = []
        self.empty = 0
        self.largest_token = 0
        self.longest = ("", 0)

    def read(self, text: str) -> None:
        """Takes a text into the source's hash and, by 64 bits of its own hash, into the search for duplicates."""
        content = text.encode()
        self.source.update(len(content).to_bytes(8, "little"))
        self.source.update(content)
        if content:
            self.hashes.append(xxhash.xxh3_64_intdigest(content))

    def written(self, document: Document, length: int) -> None:
        try:
            self.lengths.append(length)
        except OverflowError:
            raise ValueError(f"{document.source}: {length} tokens; a document of the .idx layout holds at most {2**31 - 1}") from None
        if length > self.longest[1]:
            self.longest = (document.source, length)

    def sidecar(self, tokenizer: Tokenizer, dtype: np.dtype[Any], files: dict[str, FileRecord]) -> Sidecar:
        lengths = np.array(self.lengths, np.int32)
        return Sidecar(
            tool=_tool(),
            source=self.source.hexdigest(),
            tokenizer_sha256=tokenizer.sha256,
            vocabulary=tokenizer.vocabulary,
            eod=tokenizer.eod,
            dtype=dtype.name,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            largest_token=self.largest_token,
            empty=self.empty,
            duplicates=len(self.hashes) - len(np.unique(np.array(self.hashes, np.uint64))),
            skipped=tuple(self.skipped),
            longest_document=self.longest[0],
            longest_tokens=self.longest[1],
            length_histogram=length_histogram(lengths),
            files=files,
        )


def _batches(documents: Iterable[Document | Undecodable], tally: _Tally) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        if isinstance(document, Undecodable):
            tally.skipped.append(document.source)
            continue
        tally.read(document.text)
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[Document], tokenizer: Tokenizer, dtype: np.dtype[Any], tally: _Tally) -> NDArray[Any]:
    """Ids of a batch one after the other, each document with its end (dtype, [tokens])."""
    parts = []
    for document, ids in zip(batch, tokenizer.encode([document.text for document in batch]), strict=True):
        if not ids:
            tally.empty += 1
            continue
        part = np.array([*ids, tokenizer.eod], np.int64)
        if (part[:-1] == tokenizer.eod).any():
            raise ValueError(
                f"{document.source}: its text encodes to the end-of-document id {tokenizer.eod} in places, which would end the document "
                f"there; the tokenizer must mark {tokenizer.eod_token!r} as special, or another end-of-document token must be named"
            )
        tally.largest_token = max(tally.largest_token, int(part.max()))
        tally.written(document, len(part))
        parts.append(part.astype(dtype))
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _same_work(prefix: Path, tokenizer: Tokenizer, documents: Iterable[Document | Undecodable]) -> Sidecar:
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
    tally = _Tally()
    for document in documents:
        if isinstance(document, Document):
            tally.read(document.text)
    if there.source != tally.source.hexdigest():
        raise ValueError(f"{prefix} exists, prepared from other texts: {choice}")
    return there


def _refuse_output_among_inputs(prefix: Path, inputs: Iterable[str | Path]) -> None:
    """A second run would read the first one's output."""
    target = prefix.resolve()
    for given in map(Path, inputs):
        if given.is_dir() and target.is_relative_to(given.resolve()):
            raise ValueError(f"{prefix}: lies inside the input directory {given}; choose a prefix elsewhere")


def _tool() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in ("minimax-train", "tokenizers"))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
