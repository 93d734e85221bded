"""Needles: scored as greedy decoding would be, the same however ranks share them, and told by the command line."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from data.needles import TASKS, Sample, make_sample
from data.retrieval import Vocabulary
from minimax_train.checkpoint.record import read_record
from minimax_train.engine.session import Session, session
from minimax_train.evaluate import needle
from minimax_train.evaluate.answers import said_at
from minimax_train.evaluate.generate import generate
from minimax_train.evaluate.grid import Grid, depths_of, keys_of
from minimax_train.evaluate.logits import batch_logits, fill_decoder
from minimax_train.evaluate.needle import Cell, sample_row, score
from minimax_train.model.decoder import Decoder
from minimax_train.train.rows import to_row
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place

SMALL = Vocabulary(keys=12, values=9, filler=5)
WORDS = SMALL.puzzle_words(SMALL.tokenizer())
GRID = Grid(tasks=TASKS, lengths=(50, 96), depths=(0.0, 0.6), samples=3, seed=11)


@pytest.fixture(scope="module")
def decoder(alone: Session, checkpoint: Path) -> Decoder:
    return fill_decoder(checkpoint, read_record(checkpoint), alone)


def puzzle(seed: int, length: int = 61) -> Sample:
    return make_sample("variables", WORDS, length=length, depth=0.5, draw=Random(seed))


def test_answers_are_scored_as_all_logits_say(alone: Session, decoder: Decoder) -> None:
    sample = puzzle(1)
    logits = batch_logits(decoder, torch.tensor([sample.ids]))[0].double()
    likeliest = logits.argmax(-1).tolist()
    places = [0, 17, 33, 59]
    labels = [likeliest[0], likeliest[17] ^ 1, sample.ids[34], likeliest[59]]
    said = said_at(decoder, to_row(sample_row(sample), alone), places, labels, alone.groups)
    assert said.right.tolist() == [likeliest[place] == label for place, label in zip(places, labels, strict=True)]
    assert said.right.tolist()[:2] == [True, False]
    expected = -logits.log_softmax(-1)[places, labels]
    torch.testing.assert_close(said.loss, expected, rtol=1e-5, atol=1e-6)


def test_an_answer_is_right_when_greedy_decoding_gives_it(alone: Session, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples whose answers are what the model generates, or differ from it in one token at the front, the middle or the end."""
    base = puzzle(2)
    (answer,) = base.answers
    generated = generate(decoder, base.ids[: answer.start], tokens=5, eod=None)
    samples = [replace(base, ids=base.ids[: answer.start] + generated)]
    for wrong in (0, 2, 4):
        ids = list(samples[0].ids)
        ids[answer.start + wrong] = (ids[answer.start + wrong] + 1) % 300
        samples.append(replace(base, ids=ids))
    monkeypatch.setattr(Grid, "sample", lambda self, words, task, length, depth, number: samples[number])
    (cell,) = score(decoder, WORDS, replace(GRID, tasks=("single",), lengths=(61,), depths=(0.5,), samples=4), alone)
    assert cell.accuracy == 0.25
    logits = batch_logits(decoder, torch.tensor([sample.ids for sample in samples])).double()
    told = torch.tensor([sample.ids[answer.start :] for sample in samples])
    before = logits[:, answer.start - 1 : answer.stop - 1]
    assert cell.token_accuracy == pytest.approx(float((before.argmax(-1) == told).double().mean()), abs=1e-12)
    losses = torch.nn.functional.cross_entropy(before.flatten(0, 1), told.flatten())
    assert cell.loss == pytest.approx(float(losses), rel=1e-5)


def test_the_answers_alone_are_labels(alone: Session) -> None:
    sample = puzzle(3)
    (answer,) = sample.answers
    labels = sample_row(sample).labels
    assert [(i + 1, int(label)) for i, label in enumerate(labels) if label >= 0] == [(i, sample.ids[i]) for i in answer]


def judged(
    place: Place, checkpoint: Path, layout: Layout, places: list[int], labels: list[int]
) -> tuple[list[Cell], list[bool], list[float]]:
    """All cells; and of one row, with labels of which many are right, what each place says."""
    with session(layout=layout, place=place) as joined:
        decoder = fill_decoder(checkpoint, read_record(checkpoint), joined)
        said = said_at(decoder, to_row(sample_row(puzzle(1)), joined), places, labels, joined.groups)
        return score(decoder, WORDS, GRID, joined), said.right.tolist(), said.loss.tolist()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(context=2, tensor=2),
        Layout(context=2, expert=2),
        pytest.param(Layout(expert=4), marks=pytest.mark.slow),
        pytest.param(Layout(context=4, owners="balanced"), marks=pytest.mark.slow),
    ],
    ids=["context tensor", "context expert data", "expert data", "context"],
)
def test_any_layout_says_what_one_rank_says(alone: Session, checkpoint: Path, decoder: Decoder, layout: Layout) -> None:
    sample = puzzle(1)
    logits = batch_logits(decoder, torch.tensor([sample.ids]))[0]
    places = [3, 14, 15, 31, 32, 47, 59]  # of several ranks and pieces, an odd number
    labels = [int(logits[place].argmax()) ^ (place % 2) for place in places]
    truth = score(decoder, WORDS, GRID, alone)
    assert len({round(cell.loss, 3) for cell in truth}) == len(truth) == 12
    for cells, right, loss in run_ranks(4, judged, checkpoint, layout, places, labels):
        assert right == [place % 2 == 0 for place in places]
        expected = -logits.double().log_softmax(-1)[places, labels]
        assert loss == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
        assert [replace(cell, loss=0.0) for cell in cells] == [replace(cell, loss=0.0) for cell in truth]
        assert [cell.loss for cell in cells] == pytest.approx([cell.loss for cell in truth], rel=1e-5)


def test_a_short_length_is_refused_before_any_work(alone: Session, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "said_at", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match="haystack of 20 tokens"):
        score(decoder, WORDS, replace(GRID, lengths=(64, 20)), alone)


def test_grids_that_ask_nothing_are_refused() -> None:
    for changes, says in (
        ({"depths": (0.5, 1.5)}, "from 0 to 1"),
        ({"depths": (0.5, float("nan"))}, "from 0 to 1"),
        ({"samples": 0}, "samples 0"),
        ({"lengths": ()}, "at least one"),
        ({"lengths": (64, 64)}, "once"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(GRID, **changes)  # type: ignore[arg-type]


def test_depths() -> None:
    assert depths_of("5") == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert depths_of("1") == (0.5,)
    assert depths_of("0,0.3") == (0.0, 0.3)
    for wrong in ("0", "-1.x", "", "a"):
        with pytest.raises(ValueError, match="--depths is"):
            depths_of(wrong)


def test_keys() -> None:
    """So many, or one for each so many tokens of length."""
    assert [keys_of("6").at(length) for length in (64, 4096)] == [6, 6]
    assert [keys_of("1/64").at(length) for length in (32, 64, 200, 4096)] == [1, 1, 3, 64]
    assert [str(keys_of(text)) for text in ("6", "1/64")] == ["6", "1/64"]
    for wrong in ("0", "-1", "", "a", "2/64", "1/0", "1/"):
        with pytest.raises(ValueError, match="--keys is"):
            keys_of(wrong)


def test_a_grid_asks_among_as_many_keys_as_its_length_says(alone: Session, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """And refuses, before any work, a length for which there are too few words."""
    grid = replace(GRID, tasks=("multi_key",), lengths=(64, 256), keys=keys_of("1/32"))
    keys = {WORDS.encode(str(key))[0] for key in WORDS.keys}
    for length in grid.lengths:
        sample = grid.sample(WORDS, "multi_key", length, 0.5, 0)
        assert len(keys & set(sample.ids)) == length // 32
    monkeypatch.setattr(needle, "said_at", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match="needs 16 different words of a kind"):
        score(decoder, WORDS, replace(grid, lengths=(64, 512)), alone)
