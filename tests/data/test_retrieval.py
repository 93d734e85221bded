"""Documents of a vocabulary of their own: whole, reproducible, and answered by what stands in them."""

from pathlib import Path
from random import Random

import pytest

from data.dataset import verify
from data.needles import TASKS, make_sample
from data.retrieval import GROWING, Vocabulary, vocabulary_of, write_lengths, write_retrieval
from data.tokenizer import load_tokenizer, train_tokenizer

SMALL = Vocabulary(keys=12, values=9, filler=5)


def test_documents_answer_their_own_questions(tmp_path: Path) -> None:
    write_retrieval(tmp_path / "set", SMALL, length=64, documents=40, pairs=6, questions=7, seed=3)
    dataset = verify(tmp_path / "set", tokenizer=SMALL.tokenizer())
    assert dataset.lengths.tolist() == [64] * 40
    words, counts = SMALL.words, set()
    for document in range(40):
        said = [words[i] for i in dataset.tokens(document)]
        first = said.index("?")
        facts = {key: value for key, value in zip(said[:first], said[1:first], strict=False) if key.startswith("key")}
        asked = said[first:-1]
        assert said[-1] == "<|endoftext|>"
        assert asked[::3] == ["?"] * 7
        assert all(facts[key] == value for key, value in zip(asked[1::3], asked[2::3], strict=True))
        assert all(value.startswith("value") for value in facts.values())
        counts.add(len(facts))
    assert counts == {1, 2, 3, 4, 5, 6}


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    made = [
        write_retrieval(tmp_path / str(n), SMALL, length=48, documents=5, pairs=3, questions=2, seed=seed)
        for n, seed in enumerate((1, 1, 2))
    ]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint


def test_a_tokenizer_file_tells_its_vocabulary(tmp_path: Path) -> None:
    write_retrieval(tmp_path / "set", SMALL, length=48, documents=2, pairs=3, questions=2, seed=1)
    assert vocabulary_of(load_tokenizer(tmp_path / "set.tokenizer.json")) == SMALL
    assert vocabulary_of(train_tokenizer(["key0 value0 filler0"], vocabulary=300)) is None


@pytest.mark.parametrize("task", TASKS)
def test_every_word_of_a_puzzle_is_one_id(task: str) -> None:
    tokenizer = SMALL.tokenizer()
    sample = make_sample(task, SMALL.puzzle_words(tokenizer), length=80, depth=0.5, draw=Random(1))  # type: ignore[arg-type]
    assert len(sample.ids) == 80
    assert 0 not in sample.ids
    assert tokenizer.encode([tokenizer.decode(sample.ids)])[0] == sample.ids
    assert [len(answer) for answer in sample.answers] == [5 if task == "variables" else 1]


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for changes, says in (
        ({"pairs": 10}, "1 to 9"),
        ({"pairs": 0}, "pairs is 0"),
        ({"questions": 0}, "questions is 0"),
        ({"length": 20}, "haystack of 19"),
    ):
        with pytest.raises(ValueError, match=says):
            write_retrieval(tmp_path / "set", SMALL, **{"length": 64, "documents": 30, "pairs": 6, "questions": 6, "seed": 1, **changes})  # type: ignore[arg-type]
    assert not list(tmp_path.glob("set*"))


@pytest.mark.parametrize("depth", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_a_fact_stands_at_its_depth_to_the_token(depth: float) -> None:
    """Where a sentence is one id, the nearest border is the place itself."""
    sample = make_sample("single", SMALL.puzzle_words(SMALL.tokenizer()), length=205, depth=depth, draw=Random(2))  # 200 of them filler
    assert next(i for i, number in enumerate(sample.ids) if SMALL.words[number].startswith("key")) == round(200 * depth)


def test_longer_documents_hide_more(tmp_path: Path) -> None:
    """At 64 tokens a key: up to 1 in 64 tokens, 8 in 512; an eighth of the tokens are questions; the model's 80 words suffice."""
    write_lengths(tmp_path, {64: 20, 512: 30}, seed=3)
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["512.bin", "64.bin", "validation.bin"]
    assert len(GROWING.words) == 80
    for name, length, documents, keys in (("64", 64, 20, {1}), ("512", 512, 30, set(range(1, 9))), ("validation", 64, 64, {1})):
        dataset = verify(tmp_path / name, tokenizer=GROWING.tokenizer())
        assert dataset.lengths.tolist() == [length] * documents
        said = [[GROWING.words[i] for i in dataset.tokens(number)] for number in range(documents)]
        assert {len({word for word in one[: one.index("?")] if word.startswith("key")}) for one in said} == keys
        assert {one.count("?") for one in said} == {length // 8}
    assert (tmp_path / "64.bin").read_bytes() != (tmp_path / "validation.bin").read_bytes()[: 20 * 64 * 2]
