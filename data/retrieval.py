"""Documents to learn retrieval from, in a vocabulary of their own: keys, values and filler are single ids.

Ours, for small models: in a language a model must first learn the language. A document is filler with pairs of a key and its value in it,
and at its end questions, which may come again. They become token files as `data prepare` writes them, with a tokenizer of these words.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from data.corpus import Document
from data.format import Sidecar
from data.needles import Words, hide, key_values
from data.prepare import write_dataset
from data.progress import Progress
from data.tokenizer import END_OF_DOCUMENT_NAMES, Tokenizer, word_tokenizer

MARKS = (END_OF_DOCUMENT_NAMES[0], "?", "=")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """So many words of each kind; ids in the order of `words`."""

    keys: int = 64
    values: int = 64
    filler: int = 16

    @property
    def words(self) -> tuple[str, ...]:
        """By id."""
        kinds = (("key", self.keys), ("value", self.values), ("filler", self.filler))
        return (*MARKS, *(f"{kind}{number}" for kind, count in kinds for number in range(count)))

    def tokenizer(self) -> Tokenizer:
        """Of these words, with white space between."""
        return word_tokenizer(self.words)

    def puzzle_words(self, tokenizer: Tokenizer) -> Words:
        """How puzzles are said: "key7 value3" is a fact, "? key7" a question, "key7 = value3" an assignment."""
        words, first = self.words, len(MARKS)
        keys, values = words[first : first + self.keys], words[first + self.keys : first + self.keys + self.values]
        return Words(
            encode=lambda text: tokenizer.encode([text])[0],
            intro="",
            filler=words[first + self.keys + self.values :],
            keys=keys,
            values=values,
            names=keys,
            fact="{key} {value}",
            asked="? {key}",
            told="{value}",
            assigned="{name} = {value}",
            linked="{name} = {other}",
            which="? = {value}",
            between=" ",
        )


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary | None:
    """The vocabulary whose tokenizer this is, None for a tokenizer of text."""
    try:
        names = list(json.loads(tokenizer.content)["model"]["vocab"])
    except (ValueError, KeyError, TypeError):  # sentencepiece models are no JSON
        return None
    counts = {kind: sum(isinstance(name, str) and name.startswith(kind) for name in names) for kind in ("key", "value", "filler")}
    found = Vocabulary(keys=counts["key"], values=counts["value"], filler=counts["filler"])
    return found if found.tokenizer().sha256 == tokenizer.sha256 else None


def write_retrieval(prefix: Path, vocabulary: Vocabulary, *, length: int, documents: int, pairs: int, questions: int, seed: int) -> Sidecar:
    """Writes PREFIX.bin, .idx, .json and the tokenizer: `documents` of exactly `length` tokens each, the end-of-document id included.

    Each hides 1 to `pairs` keys with their values anywhere and then asks `questions` questions, each for any of them: that keys come again
    is what retrieval is learned from quickly. Replaces what stood at PREFIX. The same arguments give the same files. ValueError where there
    are fewer words than pairs, no questions, or `length` is too short.
    """
    if not 1 <= pairs <= min(vocabulary.keys, vocabulary.values):
        raise ValueError(f"pairs is {pairs}; it must be 1 to {min(vocabulary.keys, vocabulary.values)}, the fewer of keys and values")
    if questions < 1 or vocabulary.filler < 1:
        raise ValueError(f"questions is {questions}, and the vocabulary has {vocabulary.filler} words of filler; each must be at least 1")
    tokenizer, names = vocabulary.tokenizer(), vocabulary.words
    words = vocabulary.puzzle_words(tokenizer)

    def made() -> Iterator[Document]:
        for number in range(documents):
            draw = Random(f"{seed}/{number}")
            count = draw.randint(1, pairs)
            depths = [draw.random() for _ in range(count)]
            puzzle = key_values(words, depths, draw, questions=draw.choices(range(count), k=questions))
            text = " ".join(names[i] for i in hide(puzzle, words, length - 1, draw).ids)
            yield Document(source=f"retrieval/{number}", text=text, size=len(text))

    with Progress(f"retrieval {prefix}", documents * length, quiet=True) as progress:
        return write_dataset(made(), tokenizer, prefix, progress=progress)


GROWING = Vocabulary(keys=32, values=32, filler=13)
"""Of `write_lengths`: 80 words. Few keys, for a small model finds the mechanism after some hundred steps with 32 and not with 128. Ours."""
TOKENS_A_KEY = 64
"""In `write_lengths` a document of so many tokens hides one key at most, one of n times as many n. Ours."""


def write_lengths(
    folder: Path, documents: Mapping[int, int], seed: int, *, vocabulary: Vocabulary = GROWING, tokens_a_key: int = TOKENS_A_KEY
) -> None:
    """Writes FOLDER/256 and so on, token files with documents of one length each, and FOLDER/validation of the shortest, for
    `recipes.tiny:retrieval`: {length: how many}. Keys and questions grow with the length. ValueError as from `write_retrieval`."""
    shortest = min(documents)
    parts = [(str(length), length, count, seed) for length, count in documents.items()]
    for name, length, count, drawn in (*parts, ("validation", shortest, 64, seed + 1_000_000)):
        pairs, questions = max(1, length // tokens_a_key), length // 8
        write_retrieval(folder / name, vocabulary, length=length, documents=count, pairs=pairs, questions=questions, seed=drawn)
