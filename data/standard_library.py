"""The standard library's own source as a corpus: real, long documents on every machine, without a network."""

import json
import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import xxhash

from data.commit import commit_folder, staged
from data.corpus import Document, Undecodable, standard_library
from data.prepare import write_dataset
from data.progress import Progress
from data.shuffle import shuffled
from data.tokenizer import FILE_NAME, Tokenizer, train_tokenizer

LENGTH_CLASSES = (256, 2048, 8192, 32768)
"""Least tokens (end of document included) of each class that documents are held out from; shorter ones are scraps and stay in training."""

LEAST = 2
"""Documents held out from each class, the shortest of its pool."""

SHARES = (1.0, 0.6, 0.6, 0.6)
"""The part a class may spend of the held-out tokens that are left then; the longest class goes first."""

POOL, POOL_PART = 32, 0.75
"""Documents drawn from each class, and the greatest part of it, from which the held-out ones are chosen when their lengths are known."""

OWN = 0.5
"""Least part of a held-out document's text in lines that no other document has: encodings/cp1250.py is mostly that of cp1251.py."""

BYTES_PER_TOKEN = 2.6
"""Measured at 1,024 ids on Python 3.11's library: 2.58, but below 1.9 in 5 % of documents; so true lengths are counted (`_hold_out`)."""

TOKENIZER_BYTES = 8_000_000
"""Text the tokenizer learns from: 2 s instead of 8 s for all of it, and 2.578 instead of 2.588 bytes per token."""

RECORD = "standard_library.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """Prefixes of the two datasets and the tokenizer file."""

    train: Path
    validation: Path
    tokenizer: Path


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What decides the outcome; a directory made with other values is refused."""

    version: int = VERSION
    vocabulary: int
    held_out_tokens: int
    seed: int
    root: str | None
    without: tuple[str, ...]


def prepare_standard_library(
    directory: str | Path,
    *,
    vocabulary: int = 1024,
    held_out_tokens: int = 100_000,
    seed: int = 0,
    root: Path | None = None,
    without: Sequence[str] = (),
    quiet: bool = False,
) -> StandardLibrary:
    """Makes `directory` with train, validation (both as by `prepare`) and tokenizer.json; returns at once when it is there already.

    Held-out documents, at most `held_out_tokens` in all, are drawn within each length class (LENGTH_CLASSES), at least two of every class
    that has three. Documents that share most of their lines with others (OWN) stay in training, and a text equal to an earlier one but for
    white space is left out, so none is on both sides. The tokenizer learns from a sample of training documents only. Deterministic in the
    arguments and the library's files; `root` and `without` are those of `corpus.standard_library`.

    The directory appears whole or not at all; of two processes that make it at once, the later takes the earlier one's. Raises ValueError
    when the directory holds something else, was made with other values, or the held-out tokens are too few for two documents per class.
    """
    directory = Path(directory)
    choice = _Choice(
        vocabulary=vocabulary, held_out_tokens=held_out_tokens, seed=seed, root=str(root) if root else None, without=tuple(without)
    )
    result = StandardLibrary(train=directory / "train", validation=directory / "validation", tokenizer=directory / FILE_NAME)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        _check_same_choice(directory, choice)
        return result
    documents, doubles, undecodable = _distinct(root, without)
    with staged(directory) as folder:
        work = folder / "new"
        work.mkdir()
        tokenizer, held_out = _hold_out(documents, choice)
        (work / FILE_NAME).write_bytes(tokenizer.content)
        training = [document for number, document in enumerate(documents) if number not in held_out]
        validation = [document for number, document in enumerate(documents) if number in held_out]
        parts: dict[str, list[Document | Undecodable]] = {"train": [*training, *undecodable], "validation": [*validation]}
        for name, part in parts.items():
            with Progress(f"prepare {name}", sum(document.size for document in part), quiet=quiet) as progress:
                write_dataset(part, tokenizer, work / name, progress=progress)
        record = {
            "choice": asdict(choice),
            "python": platform.python_version(),
            "held_out": {documents[number].source: length for number, length in sorted(held_out.items())},
            "doubles_left_out": doubles,
            "not_utf8": [document.source for document in undecodable],
        }
        (work / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if not commit_folder(work, directory):
            _check_same_choice(directory, choice)
    return result


def _check_same_choice(directory: Path, choice: _Choice) -> None:
    try:
        made = json.loads((directory / RECORD).read_text())["choice"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{directory}: exists and is not a prepared standard library; choose another directory or remove it") from None
    wanted = json.loads(json.dumps(asdict(choice)))
    if made != wanted:
        differing = [f"{name} {made.get(name)!r}, asked for {value!r}" for name, value in wanted.items() if made.get(name) != value]
        raise ValueError(f"{directory}: was made with {'; '.join(differing)}: choose another directory or remove it")


def _distinct(root: Path | None, without: Sequence[str]) -> tuple[list[Document], list[str], list[Undecodable]]:
    """Documents with text, the names of those equal to an earlier one but for white space, and the files that are not UTF-8."""
    documents: list[Document] = []
    doubles: list[str] = []
    undecodable: list[Undecodable] = []
    seen = set()
    for document in standard_library(root, without=without):
        if isinstance(document, Undecodable):
            undecodable.append(document)
            continue
        words = document.text.split()
        key = xxhash.xxh3_128_digest(" ".join(words).encode())
        if words and key in seen:
            doubles.append(document.source)
            continue
        seen.add(key)
        documents.append(document)
    return documents, doubles, undecodable


def _hold_out(documents: list[Document], choice: _Choice) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer and {number: tokens} of the documents to hold out.

    The tokenizer must not see held-out text, and true lengths are known only with the tokenizer. So a pool is drawn by size in bytes, the
    tokenizer learns from a sample of all the others, the pool is encoded, and documents are held out from it; the rest goes to training.
    """
    order = shuffled(len(documents), seed=choice.seed).tolist()
    sizes = [document.size / BYTES_PER_TOKEN for document in documents]
    own = _own_parts(documents)
    pool: list[int] = []
    for low, high in _bounds():
        members = [number for number in order if low <= sizes[number] < high and own[number] >= OWN]
        if high == math.inf:
            members.sort(key=lambda number: sizes[number])  # its longest would take the whole budget: those just over the bound
        pool += members[: min(POOL, math.ceil(POOL_PART * len(members)))]
    outside, sample, size = set(pool), [], 0
    for number in order:
        if number not in outside and size < TOKENIZER_BYTES:
            sample.append(documents[number].text)
            size += documents[number].size
    tokenizer = train_tokenizer(sample, vocabulary=choice.vocabulary)
    lengths = {number: len(tokenizer.encode([documents[number].text])[0]) + 1 for number in pool}
    return tokenizer, _choose(lengths, choice.held_out_tokens)


def _own_parts(documents: list[Document]) -> list[float]:
    """For each document the part of its distinct lines, by characters, that no other document has."""
    lines = [{line.strip() for line in document.text.splitlines()} for document in documents]
    holders = Counter(chain.from_iterable(lines))
    return [sum(len(line) for line in own if holders[line] == 1) / max(1, sum(map(len, own))) for own in lines]


def _choose(lengths: dict[int, int], budget: int) -> dict[int, int]:
    """The LEAST shortest documents of each class; what the budget has left buys more of them, the longest class first. {number: tokens}."""
    classes = [sorted((length, number) for number, length in lengths.items() if low <= length < high) for low, high in _bounds()]
    chosen = {number: length for candidates in classes for length, number in candidates[:LEAST]}
    left = budget - sum(chosen.values())
    if left < 0:
        raise ValueError(f"held_out_tokens {budget}: too few for {LEAST} documents of every length class; allow {budget - left} or more")
    for candidates, share in zip(reversed(classes), reversed(SHARES), strict=True):
        allowance = share * left
        for length, number in candidates[LEAST:]:
            if length > allowance:
                break
            chosen[number] = length
            allowance -= length
            left -= length
    return chosen


def _bounds() -> list[tuple[int, float]]:
    return list(zip(LENGTH_CLASSES, [*LENGTH_CLASSES[1:], math.inf], strict=True))
