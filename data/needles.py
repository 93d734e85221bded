"""Needles in a haystack: facts hidden in filler, and questions about them behind it, as token ids of exactly a wanted length.

In the manner of RULER (arXiv 2404.06654), made here rather than downloaded; the words are ours. Every draw is from the generator given, so
that the same seed gives the same ids.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal, get_args

Task = Literal["single", "multi_key", "variables"]
TASKS: tuple[Task, ...] = get_args(Task)
KEYS = 4
"""Keys in `multi_key` where nothing else is said, one of them asked for: RULER's niah_multikey_1 has as many."""
HOPS = 4
"""Links of a chain in `variables` behind its first assignment, as in RULER's. The second chain, of another value, is ours: with one alone
every variable of the text is an answer."""

Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class Words:
    """How puzzles are said. Templates are filled in with `str.format`; a piece is encoded by itself, so that it is always the same ids."""

    encode: Callable[[str], Ids]
    intro: str
    filler: Sequence[str]
    """Sentences, said round and round; a fact stands between two of them."""
    keys: Sequence[object]
    values: Sequence[object]
    names: Sequence[object]
    """Of variables."""
    fact: str
    """{key} has {value}."""
    asked: str
    """The question for the value of {key}."""
    told: str
    """The answer {value}."""
    assigned: str
    """{name} has {value}."""
    linked: str
    """{name} has what {other} has."""
    which: str
    """The question for the variables that have {value}."""
    between: str
    """Between two names of that answer, whose whole is said like `told`."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document, without an end-of-document id, and where in it the answers stand."""

    ids: Ids
    answers: tuple[range, ...]


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """Statements, each with its depth (0: before the filler, 1: behind it), and questions, each with its answer."""

    statements: Sequence[tuple[float, Ids]]
    questions: Sequence[tuple[Ids, Ids]]


def make_sample(task: Task, words: Words, *, length: int, depth: float, draw: Random, keys: int = KEYS) -> Sample:
    """A sample of `length` ids with one question, at its end: what it asks for stands at `depth`.

    single: one key has a value. multi_key: `keys` keys do, all but one of them anywhere. variables: a chain of assignments begins at
    `depth` and goes on anywhere behind, another one anywhere; asked are the five variables of the first, in their order. Raises ValueError
    where `length` is too short, or there are fewer words than keys.
    """
    if task == "variables":
        return hide(_variables(words, depth, draw), words, length, draw)
    depths = [depth, *(draw.random() for _ in range(keys - 1 if task == "multi_key" else 0))]
    return hide(key_values(words, depths, draw, questions=[0]), words, length, draw)


def key_values(words: Words, depths: Sequence[float], draw: Random, *, questions: Sequence[int]) -> Puzzle:
    """A key with a value at each of `depths`, and `questions`, in order: each asks for the key at depths[i]."""
    keys, values = _drawn(words.keys, len(depths), draw), _drawn(words.values, len(depths), draw)
    pairs = list(zip(keys, values, strict=True))
    return Puzzle(
        statements=[
            (depth, words.encode(words.fact.format(key=key, value=value))) for depth, (key, value) in zip(depths, pairs, strict=True)
        ],
        questions=[
            (words.encode(words.asked.format(key=key)), words.encode(words.told.format(value=value)))
            for key, value in (pairs[i] for i in questions)
        ],
    )


def _variables(words: Words, depth: float, draw: Random) -> Puzzle:
    values, names = _drawn(words.values, 2, draw), _drawn(words.names, 2 * (HOPS + 1), draw)
    statements: list[tuple[float, Ids]] = []
    for value, begin, chain in ((values[0], depth, names[: HOPS + 1]), (values[1], draw.random(), names[HOPS + 1 :])):
        statements.append((begin, words.encode(words.assigned.format(name=chain[0], value=value))))
        depths = sorted(begin + (1 - begin) * draw.random() for _ in range(HOPS))
        for place, other, name in zip(depths, chain, chain[1:], strict=False):
            statements.append((place, words.encode(words.linked.format(name=name, other=other))))
    answer = words.encode(words.told.format(value=words.between.join(map(str, names[: HOPS + 1]))))
    return Puzzle(statements=statements, questions=[(words.encode(words.which.format(value=values[0])), answer)])


def _drawn(population: Sequence[object], count: int, draw: Random) -> list[object]:
    """So many of them, all different."""
    if count > len(population):
        raise ValueError(f"a puzzle needs {count} different words of a kind, and the vocabulary has {len(population)}: make it larger")
    return draw.sample(population, count)


def hide(puzzle: Puzzle, words: Words, length: int, draw: Random) -> Sample:
    """Intro, filler with the statements between its sentences, questions with their answers: exactly `length` ids.

    Each statement stands at the end of a sentence nearest to its depth; the filler's last sentence is cut where it has to be. ValueError
    where `length` leaves no room for filler.
    """
    ids = words.encode(words.intro) if words.intro else []
    needed = len(ids) + sum(len(said) for _, said in puzzle.statements) + sum(len(part) for pair in puzzle.questions for part in pair)
    room = length - needed
    if room < 0:
        raise ValueError(f"a haystack of {length} tokens was asked for, and what is hidden and asked takes {needed}: make it longer")
    filler = _Filler.of(words, room, draw)
    begin = 0
    for place, said in sorted(((filler.border(depth), said) for depth, said in puzzle.statements), key=lambda item: item[0]):
        ids += filler.ids[begin:place] + said
        begin = place
    ids += filler.ids[begin:]
    answers = []
    for question, answer in puzzle.questions:
        ids += question
        answers.append(range(len(ids), len(ids) + len(answer)))
        ids += answer
    return Sample(ids=ids, answers=tuple(answers))


@dataclass(frozen=True, kw_only=True)
class _Filler:
    """Exactly so many ids of sentences, and where the sentences of one round end."""

    ids: Ids
    ends: list[int]

    @classmethod
    def of(cls, words: Words, tokens: int, draw: Random) -> "_Filler":
        first = draw.randrange(len(words.filler))
        sentences = [words.encode(sentence) for sentence in (*words.filler[first:], *words.filler[:first])]
        once = [number for sentence in sentences for number in sentence]
        return cls(ids=(once * (tokens // len(once) + 1))[:tokens], ends=[0, *accumulate(map(len, sentences))])

    def border(self, depth: float) -> int:
        """The end of a sentence nearest to depth * tokens; the filler's own ends count as such."""
        tokens = len(self.ids)
        rounds, rest = divmod(round(depth * tokens), self.ends[-1])
        above = bisect_left(self.ends, rest)
        near = [rounds * self.ends[-1] + self.ends[i] for i in (max(above - 1, 0), above)]
        return min((*(place for place in near if place <= tokens), tokens), key=lambda place: abs(place - depth * tokens))


def english(encode: Callable[[str], Ids]) -> Words:
    """Plain sentences for any tokenizer of text. Keys, numbers and filler are of RULER's kinds."""
    kinds = ["brave", "calm", "eager", "fancy", "gentle", "happy", "jolly", "kind", "lively", "merry", "nice", "proud", "quick", "rapid"]
    things = ["apple", "bridge", "candle", "door", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle", "lamp", "mirror"]
    return Words(
        encode=encode,
        intro="Some special magic numbers are hidden in the following text. Memorize them: I will ask for them afterwards.\n",
        filler=(" The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again."),
        keys=[f"{kind}-{thing}" for kind in kinds for thing in things],
        values=range(1_000_000, 10_000_000),
        names=[a + b + c for a in "BCDFGHJKLM" for b in "AEIOU" for c in "NPRSTVWXYZ"],
        fact=" One of the special magic numbers for {key} is: {value}.",
        asked="\nWhat is the special magic number for {key} in the text above? The special magic number for {key} is:",
        told=" {value}",
        assigned=" VAR {name} = {value}.",
        linked=" VAR {name} = VAR {other}.",
        which="\nWhich variables have the value {value} in the text above? They are:",
        between=", ",
    )
