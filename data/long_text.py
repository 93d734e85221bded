"""Encoding a text of any length piece by piece, with the ids of the whole.

A text of up to `encoder.longest` characters is encoded whole. A longer one is cut where the tokenizer is shown to keep the two sides
apart: the encoder must give for the AROUND characters on both sides of the cut, taken together, exactly the ids of the left side followed
by those of the right. Candidates are, in this order, (1) after a line feed between two characters that are no white space, (2) before a
space between two word characters, (3) such a line feed or space itself, which is then dropped: a tokenizer that puts a space before every
text makes it again. Pre-tokenizers that split by regular expression (GPT, Llama 3, Qwen, DeepSeek) always split at (1) and (2), whatever
stands further away, and BPE does not join across a split; sentencepiece models split at (3). Where no candidate holds within MOST
characters, as in one word of that size, the document is refused: cut elsewhere its ids would depend on how it was cut.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from data.encoder import Encoder
from data.long_line import BadText

AROUND = 4096
"""Characters on each side of a cut that are encoded to prove it."""

MOST = 32 << 20
"""Characters within which a cut must be found."""

TRIES = 8
WINDOW = 1 << 16
CANDIDATES = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\w)(?= \w)"), re.compile(r"(?<=\S)[\n ](?=\S)"))


def encode_long(pieces: Iterable[str], encoder: Encoder) -> Iterator[NDArray[np.uint32]]:
    """The ids of the text that `pieces` make up, in parts. Raises BadText when it has to be cut and cannot be."""
    held: list[str] = []
    size, enough = 0, encoder.longest + AROUND
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size < enough:
            continue
        text = "".join(held)
        done, enough = 0, encoder.longest + AROUND
        while len(text) - done >= enough:
            cut = _find(text, done, done + enough - AROUND, encoder)
            if cut is None:
                enough = 2 * (len(text) - done)
                if len(text) - done > MOST:
                    raise BadText(
                        f"too long to encode at once, and no place to cut it in {len(text) - done} characters; split the document"
                    )
                break
            yield encoder.encode([text[done : cut[0]]])[0]
            done = cut[1]
        held = [text[done:]]
        size = len(held[0])
    yield encoder.encode(["".join(held)])[0]


def _find(text: str, begin: int, last: int, encoder: Encoder) -> tuple[int, int] | None:
    """Where the left side of a proven cut ends and the right side begins, between `begin` and `last`, as far right as is quickly found."""
    for low in (max(begin + 1, last - WINDOW), begin + 1):
        for pattern in CANDIDATES:
            found = deque((match.span() for match in pattern.finditer(text, low, last)), maxlen=TRIES)
            for left, right in reversed(found):
                if _holds(text, begin, left, right, encoder):
                    return left, right
    return None


def _holds(text: str, begin: int, left: int, right: int, encoder: Encoder) -> bool:
    before, after = max(begin, left - AROUND), right + AROUND
    ids, ends = encoder.encode([text[before:after], text[before:left], text[right:after]])
    return np.array_equal(ids[: ends[1]], ids[ends[1] :])
