"""Looks at a corpus before, or without, encoding it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import xxhash

from data.corpus import Source
from data.long_line import BadText
from data.reading import Bad, Batch, LongText, read
from data.slices import Part, Slice, cut

Item = TypeVar("Item")

PLACES = 16
"""Parts of the corpus that are looked into, evenly spread."""

TEXTS, CHARACTERS = 4, 2048
"""Texts taken from each, and what of each text: from its beginning or its middle, in turn."""

LOOK = 1 << 18
"""Bytes of a part of lines that are read for it."""


def sample_texts(sources: Sequence[Source], key: str, room: Path) -> list[str]:
    """Pieces of texts from all over the corpus, 128 Ki characters at most: of a compressed file, from its beginning."""
    texts: list[str] = []
    chosen = _spread(sources, PLACES)
    for source in chosen:
        pieces = cut([source], key=key, room=room)
        parts = (
            [next(pieces).parts[0]] if source.codec else _spread([part for piece in pieces for part in piece.parts], PLACES // len(chosen))
        )
        pieces.close()  # type: ignore[attr-defined]
        for part in parts:
            texts += _look(part, key)
            if source.codec and part.file:
                part.file.unlink()
    return texts


def text_hashes(sources: Sequence[Source], key: str, room: Path) -> str:
    """The xxh3-128 of the 64-bit hashes of all texts in order: what a sidecar calls its source."""
    whole = xxhash.xxh3_128()
    for piece in cut(sources, key=key, room=room):
        for record in read(piece, key):
            if isinstance(record, Batch):
                for text in record.texts:
                    whole.update(xxhash.xxh3_64_intdigest(text.encode()).to_bytes(8, "little"))
            elif isinstance(record, LongText):
                digest = xxhash.xxh3_64()
                try:
                    for text in record.pieces:
                        digest.update(text.encode())
                except BadText:
                    continue
                whole.update(digest.intdigest().to_bytes(8, "little"))
        for path in piece.unpacked:
            path.unlink()
    return whole.hexdigest()


def _look(part: Part, key: str) -> list[str]:
    if part.source.kind == "lines":
        part = replace(part, stop=min(part.stop, part.start + LOOK))
    texts: list[str] = []
    for record in read(Slice(number=0, parts=(part,)), key):
        if isinstance(record, Batch):
            texts = _spread(record.texts, TEXTS)
        elif isinstance(record, LongText):
            texts = list(islice(record.pieces, 1))
        if not isinstance(record, Bad):
            break
    starts = [len(text) // 2 if number % 2 else 0 for number, text in enumerate(texts)]
    return [text[start : start + CHARACTERS] for start, text in zip(starts, texts, strict=True)]


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    count = max(1, min(most, len(items)))
    return [items[number * len(items) // count] for number in range(count)] if items else []
