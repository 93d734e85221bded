"""Haystacks: exact lengths, facts where they should be, answers that the text alone decides."""

import re
from random import Random

import pytest

from data.needles import TASKS, Sample, Task, Words, english, make_sample
from data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["The grass is green. One of the special magic numbers for calm-door is: 123. VAR X = VAR Y."], vocabulary=300)


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> Words:
    return english(lambda text: tokenizer.encode([text])[0])


def parts(tokenizer: Tokenizer, sample: Sample) -> tuple[str, str]:
    """Everything before the answer, and the answer; nothing stands behind it."""
    (answer,) = sample.answers
    assert answer.stop == len(sample.ids)
    return tokenizer.decode(sample.ids[: answer.start]), tokenizer.decode(sample.ids[answer.start :])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [700, 2048, 4097])
def test_lengths_are_exact_and_seeds_decide(words: Words, task: Task, length: int) -> None:
    made = [make_sample(task, words, length=length, depth=0.3, draw=Random(seed)) for seed in (1, 1, 2)]
    assert [len(sample.ids) for sample in made] == [length] * 3
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(("task", "keys"), [("single", 1), ("multi_key", 4), ("multi_key", 9)])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_reader_finds_the_number_at_its_depth(words: Words, tokenizer: Tokenizer, task: Task, keys: int, depth: float) -> None:
    before, answer = parts(tokenizer, make_sample(task, words, length=3000, depth=depth, draw=Random(7), keys=keys))
    facts = re.findall(r"special magic numbers for (\S+) is: (\d{7})\.", before)
    assert len(dict(facts)) == keys
    asked = re.findall(r"The special magic number for (\S+) is:$", before)
    assert answer == " " + dict(facts)[asked[0]]
    haystack = re.sub(
        r" One of the special[^.]*\.", lambda m: "@" if asked[0] in m[0] else "", before[before.index("\n") + 1 : before.rindex("\nWhat")]
    )
    assert haystack.index("@") / (len(haystack) - 1) == pytest.approx(depth, abs=0.02)
    around = haystack[: haystack.index("@")]
    assert around == "" or around.endswith(".") or depth == 1.0


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_reader_that_follows_the_chain_finds_the_variables(words: Words, tokenizer: Tokenizer, depth: float) -> None:
    for seed in range(5):
        before, answer = parts(tokenizer, make_sample("variables", words, length=3000, depth=depth, draw=Random(seed)))
        known: dict[str, str] = {}
        for name, said in re.findall(r" VAR (\w{3}) = ((?:VAR )?\w+)\.", before):
            known[name] = known[said[4:]] if said.startswith("VAR ") else said  # a link stands behind what it names
        assert len(known) == 10
        (value,) = re.findall(r"Which variables have the value (\d+) ", before)
        assert answer == " " + ", ".join(name for name, held in known.items() if held == value)
        assert answer.count(",") == 4


def test_what_does_not_fit_is_refused(words: Words) -> None:
    with pytest.raises(ValueError, match="haystack of 50 tokens"):
        make_sample("single", words, length=50, depth=0.5, draw=Random(1))
