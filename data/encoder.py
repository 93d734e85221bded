"""The two ways to encode: the tokenizer's own library, which is always right, and gigatoken where it gives the same ids."""

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from data.tokenizer import Tokenizer

Choice = Literal["auto", "gigatoken", "reference"]

WORTH_IT = 4 << 20
"""Bytes of input below which starting gigatoken costs more than it saves."""

GROWTH = 64 << 20
"""Bytes by which the process may grow before gigatoken's cache of words, which it never empties, is thrown away."""

PROBES = (
    "",
    " ",
    "\n\n\n",
    "e\u0301\u0323 नमस्ते ก็ ﬁ\u00a0\u3000",
    "文書の 👩‍👩‍👧",
    "\r\n\t\r  \n x",
    "a" * 300,
    "1234567890" * 5,
    "\x00\x1f\ufeff\ufffd",
)
"""Strings on which fast tokenizers have gone wrong."""

Ids = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The ids of several texts one after the other [N], and where each begins and the last one ends [D + 1]."""


class Encoder(Protocol):
    """Text to ids. `longest` is how many characters of one text it takes at once in reasonable memory."""

    name: str
    longest: int

    def encode(self, texts: Sequence[str]) -> Ids: ...

    def refresh(self) -> None:
        """Lets go of memory that has piled up; called now and then."""


class ReferenceEncoder:
    """`tokenizers` or sentencepiece themselves. Their records take some hundred bytes a token, so little is encoded at once."""

    longest = 1 << 20
    batch = 1 << 20

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.library

    def encode(self, texts: Sequence[str]) -> Ids:
        parts: list[NDArray[np.uint32]] = []
        lengths: list[int] = []
        for group in _groups(texts, self.batch):
            lists = self.tokenizer.encode(group)
            lengths += map(len, lists)
            parts.append(np.fromiter(chain.from_iterable(lists), np.uint32, sum(map(len, lists))))
        return np.concatenate([*parts, np.zeros(0, np.uint32)]), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def refresh(self) -> None:
        pass


class GigatokenEncoder:
    """gigatoken on this thread. Special tokens are left out of its tokenizer, so that in text they are text."""

    name = "gigatoken"
    longest = 2 << 20

    def __init__(self, content: bytes) -> None:
        """Raises ValueError for a tokenizer.json that gigatoken does not know."""
        record = orjson.loads(content)
        record["added_tokens"] = [token for token in record.get("added_tokens") or [] if not token.get("special")]
        self.content = orjson.dumps(record)
        self._load()

    def encode(self, texts: Sequence[str]) -> Ids:
        if not texts:
            return np.zeros(0, np.uint32), np.zeros(1, np.int64)
        layout = self.engine.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return np.asarray(layout.content.data, np.uint32)[offsets[0] : offsets[-1]], offsets - offsets[0]

    def refresh(self) -> None:
        if _memory() > self.base + GROWTH:
            self._load()

    def _load(self) -> None:
        import gigatoken

        self.engine: Any = None
        with contextlib.suppress(AttributeError, OSError):  # where the C library has no such function
            ctypes.CDLL(None).malloc_trim(0)  # or what the old cache held stays with the process
        try:
            self.engine = gigatoken.Tokenizer.from_json(self.content)
        except Exception as error:  # the library raises whatever its parser meets
            raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
        self.base = _memory()


def choose_encoder(
    tokenizer: Tokenizer, sample: Callable[[], list[str]], *, size: int, choice: Choice, say: Callable[[str], None]
) -> Encoder:
    """gigatoken if it can be had and gives the reference's ids for `sample()` and PROBES, else the reference; `say` hears why.

    With choice "auto" an input of less than WORTH_IT bytes is left to the reference, unsaid. "gigatoken" raises ValueError instead of
    falling back.
    """
    reference = ReferenceEncoder(tokenizer)
    if choice == "reference" or (choice == "auto" and size < WORTH_IT):
        return reference
    try:
        if tokenizer.library != "tokenizers":
            raise ValueError(f"a {tokenizer.library} model is encoded by its own library")
        fast = GigatokenEncoder(tokenizer.content)
        check_equal(fast, reference, [*sample(), *PROBES, *_with_added_tokens(tokenizer.content)])
    except ImportError:
        why = "gigatoken is not installed"
    except ValueError as error:
        why = str(error)
    else:
        return fast
    if choice == "gigatoken":
        raise ValueError(f"gigatoken cannot be used: {why}; leave the choice to `auto`")
    say(f"encoding with {reference.name}, not gigatoken: {why}")
    return reference


def check_equal(fast: Encoder, reference: Encoder, texts: Sequence[str]) -> None:
    """Raises ValueError with the first text for which the two give different ids."""
    (ours, ends), (theirs, their_ends) = fast.encode(texts), reference.encode(texts)
    for number, text in enumerate(texts):
        a, b = ours[ends[number] : ends[number + 1]], theirs[their_ends[number] : their_ends[number + 1]]
        if not np.array_equal(a, b):
            least = min(len(a), len(b))
            at = int(np.argmax(a[:least] != b[:least])) if (a[:least] != b[:least]).any() else least
            raise ValueError(
                f"it differs on a sample of the input: token {at} of the text that begins {text[:40]!r} is "
                f"{a[at] if at < len(a) else 'missing'}, expected {b[at] if at < len(b) else 'none'}"
            )


def _with_added_tokens(content: bytes) -> list[str]:
    """Texts that hold the tokenizer's added tokens, special or not."""
    names = [str(token["content"]) for token in orjson.loads(content).get("added_tokens") or []]
    return [f"a {name}b{name} \n{name}" for name in names[:1000]]


def _groups(texts: Sequence[str], most: int) -> list[Sequence[str]]:
    """`texts` in runs of about `most` characters."""
    groups, begin, size = [], 0, 0
    for number, text in enumerate(texts, start=1):
        size += len(text)
        if size >= most:
            groups.append(texts[begin:number])
            begin, size = number, 0
    return [*groups, texts[begin:]] if begin < len(texts) else groups


def _memory() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
