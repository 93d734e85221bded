"""The rows of a stage: the same for any number of ranks and workers and from any restart, with every figure a few integers."""

import dataclasses
import itertools
import json
import random
import threading
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from data.batches import Row
from data.mixture import Shares
from data.packing import Packing, Window, plan_window
from data.sampler import Batching, Bookmark, Sampler
from data.stream import Stream
from data.views import View, of_length
from tests.data.in_memory import check_row, dataset_of, places_of

LENGTH, SAMPLES = 16, 240
NAMES = ("short", "long", "answers")
RECORDED: dict[Packing, list[tuple[str, list[int]]]] = {
    "concat": [
        ("short", [66, 13, 88, 85, 38, 4]),
        ("short", [4, 49, 86]),
        ("short", [109, 61, 65, 115]),
        ("long", [10, 114]),
        ("short", [90, 14, 116, 70]),
    ],
    "best_fit": [
        ("short", [17, 61, 65, -1]),
        ("short", [13, 38, 86, 11]),
        ("short", [4, 49, 101, -1]),
        ("long", [34]),
        ("short", [90, 115, -1]),
    ],
}


def little_views() -> dict[str, View]:
    """Two parts of one dataset and a small one that is gone through several times."""
    draw = random.Random(3)
    dataset = dataset_of([draw.choice([1, 3, 5, 9, 12, 30, 70]) for _ in range(120)])
    return {"short": of_length(dataset, 0, 10), "long": of_length(dataset, 10), "answers": of_length(dataset_of([4, 7, 20]))}


def little_shares() -> Shares:
    """A ramp over samples 0 to 60.5, plateau, and `answers` from sample 192 on."""
    begin, base, late = ([Fraction(w, 10) for w in ws] for ws in ((8, 2, 0), (3, 7, 0), (2, 5, 3)))
    return Shares(begin, base, late, ramp=Fraction(121, 2), late_from=192)


def sampler(packing: Packing = "best_fit", bookmarks: dict[str, Bookmark] | None = None, **options: int) -> Sampler:
    batching = Batching(length=LENGTH, packing=packing, window_tokens=100)
    given = {name: Bookmark() for name in NAMES} if bookmarks is None else bookmarks
    return Sampler(little_views(), little_shares(), batching, **{"seed": 5, **options}, bookmarks=given)


def same(a: Row, b: Row) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(Row))


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def packing(request: pytest.FixtureRequest) -> Packing:
    return request.param


@pytest.fixture(scope="module")
def alone(packing: Packing) -> list[tuple[Row, str, dict[str, Bookmark]]]:
    """One rank, no worker: each sample with the bookmarks after it."""
    with sampler(packing) as rows:
        return [(sample.row, sample.source, rows.bookmarks) for sample in itertools.islice(rows, SAMPLES)]


@pytest.mark.parametrize(("ranks", "workers"), itertools.product((1, 2, 4), (0, 2)))
def test_the_same_global_batches(packing: Packing, alone: list[tuple[Row, str, dict[str, Bookmark]]], ranks: int, workers: int) -> None:
    for rank in range(ranks):
        with sampler(packing, rank=rank, ranks=ranks, workers=workers) as rows:
            for group in range(SAMPLES // ranks):
                sample, (row, source, _) = next(rows), alone[group * ranks + rank]
                assert sample.source == source
                assert same(sample.row, row)
                assert rows.bookmarks == alone[(group + 1) * ranks - 1][2]


def test_any_restart_goes_on_as_if_nothing_had_happened(packing: Packing, alone: list[tuple[Row, str, dict[str, Bookmark]]]) -> None:
    """20 kills at random samples, in turn: each time with other ranks and workers, from the integers as JSON holds them."""
    draw = random.Random(8)
    stops = sorted(draw.sample(range(0, SAMPLES, 4), 20))
    bookmarks = {name: Bookmark() for name in NAMES}
    for start, stop in itertools.pairwise([0, *stops, SAMPLES]):
        ranks, workers = draw.choice((1, 2, 4)), draw.choice((0, 1, 2))
        all_ranks = [sampler(packing, bookmarks, rank=rank, ranks=ranks, workers=workers) for rank in range(ranks)]
        for n in range(start, stop):
            assert same(next(all_ranks[n % ranks]).row, alone[n][0])
        for rows in all_ranks:
            next(rows)  # taken, but not in any checkpoint
            rows.close()
        saved = json.dumps({name: dataclasses.asdict(mark) for name, mark in alone[stop - 1][2].items()}) if stop else None
        bookmarks = {name: Bookmark(**mark) for name, mark in json.loads(saved).items()} if saved else bookmarks


def test_rows_are_right_and_counted(packing: Packing, alone: list[tuple[Row, str, dict[str, Bookmark]]]) -> None:
    views, shares = little_views(), little_shares()
    turns: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for n, (row, source, bookmarks) in enumerate(alone):
        check_row(views[source].dataset, row)
        assert len(row.tokens) == LENGTH
        turns[source] += 1
        tokens[source] += len(places_of(views[source], row))
        assert set(row.documents.tolist()) <= {-1, *views[source].documents.tolist()}
        for i, name in enumerate(NAMES):
            assert (bookmarks[name].turns, bookmarks[name].tokens) == (turns[name], tokens[name])
            assert abs(turns[name] - Fraction(shares.total(i, n + 1), shares.unit)) < 1
    assert turns["answers"] in (14, 15)
    assert all(source != "answers" for _, source, _ in alone[:192])
    assert bookmarks["answers"].tokens > 4 * views["answers"].token_count  # epochs: every document as often, give or take one


def test_each_source_is_gone_through_once_before_it_is_repeated(
    packing: Packing, alone: list[tuple[Row, str, dict[str, Bookmark]]]
) -> None:
    """Of the windows that were finished every token, and none twice in an epoch."""
    views = little_views()
    for name, view in views.items():
        held = [place for row, source, _ in alone if source == name for place in places_of(view, row)]
        mark = alone[-1][2][name]
        if mark.end <= view.token_count and packing == "best_fit":
            assert len(set(held)) == len(held)
        counts = Counter(held)
        assert max(counts.values()) <= -(-mark.end // view.token_count)


def test_stages_do_not_repeat_documents(packing: Packing) -> None:
    """The next stage, of another length, reads on behind the window the last one stood in, whatever was left of it."""
    long = {"all": of_length(dataset_of([7] * 500))}
    one = [Fraction(1)]
    shares, marks, held = Shares(one, one, one, ramp=Fraction(0), late_from=0), {"all": Bookmark()}, []
    for length in (8, 32, 64):
        with Sampler(long, shares, Batching(length=length, packing=packing, window_tokens=256), seed=1, bookmarks=marks, workers=1) as rows:
            for _ in range(5):
                held += places_of(long["all"], next(rows).row)
            marks = {name: mark.next_stage() for name, mark in rows.bookmarks.items()}
        assert (marks["all"].turns, marks["all"].rows, marks["all"].begin) == (0, 0, marks["all"].end)
    assert len(set(held)) == len(held) == marks["all"].tokens
    untouched = Bookmark(begin=9, end=9, tokens=3)
    assert untouched.next_stage() == untouched


def test_sources_and_seeds_have_orders_of_their_own() -> None:
    view = of_length(dataset_of([2] * 100))
    half = [Fraction(1, 2)] * 2
    shares = Shares(half, half, half, ramp=Fraction(0), late_from=0)
    drawn: dict[tuple[int, str], list[int]] = {}
    for seed in (1, 2):
        marks = {"a": Bookmark(), "b": Bookmark()}
        batching = Batching(length=8, packing="concat", window_tokens=2**20)
        with Sampler({"a": view, "b": view}, shares, batching, seed=seed, bookmarks=marks) as rows:
            for sample in itertools.islice(rows, 20):
                drawn.setdefault((seed, sample.source), []).extend(sample.row.documents.tolist())
    assert len({tuple(documents) for documents in drawn.values()}) == 4


def test_the_order_stays_for_ever(packing: Packing, alone: list[tuple[Row, str, dict[str, Bookmark]]]) -> None:
    """Recorded values: a run resumed with a later version must read the same rows."""
    assert [(source, row.documents.tolist()) for row, source, _ in alone[:5]] == RECORDED[packing]


def test_windows_are_planned_ahead_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never by the one that trains; and the next one while the first is read, which takes 50 rows here."""
    planned: list[tuple[int, int]] = []
    second = threading.Event()

    def recorded(stream: Stream, begin: int, **options: Any) -> Window:
        planned.append((threading.get_ident(), begin))
        if begin:
            second.set()
        return plan_window(stream, begin, **options)

    monkeypatch.setattr("data.sampler.plan_window", recorded)
    one = [Fraction(1)]
    view = of_length(dataset_of([8] * 100))
    batching = Batching(length=16, packing="concat", window_tokens=800)
    shares, marks = Shares(one, one, one, ramp=Fraction(0), late_from=0), {"all": Bookmark()}
    with Sampler({"all": view}, shares, batching, seed=1, bookmarks=marks, workers=1) as rows:
        next(rows)
        assert second.wait(60)
        assert rows.bookmarks["all"].rows == 1
    assert [begin for _, begin in planned] == [0, 800]
    assert threading.get_ident() not in {thread for thread, _ in planned}


def test_another_window_is_refused() -> None:
    with sampler() as rows:
        for _ in range(50):
            next(rows)
        marks = rows.bookmarks
    assert marks["short"].rows
    with pytest.raises(ValueError, match=r"source 'short': its window from token .* give it the data, length and packing it had"):
        sampler(bookmarks=marks | {"short": dataclasses.replace(marks["short"], end=marks["short"].end + 1)})
    with pytest.raises(ValueError, match="source 'long'"):
        sampler("concat", bookmarks=marks | {"short": Bookmark(turns=marks["short"].turns)}, workers=1)


def test_errors_of_workers_are_raised_at_their_row_and_threads_end() -> None:
    """Damage found by a thread: the rows before it are good, and closing leaves nothing behind."""
    views = little_views()
    before = threading.active_count()
    views["long"].dataset.stream[:] = views["long"].dataset.vocabulary  # beyond it; `short` is of the same file
    good = [Fraction(0), Fraction(0), Fraction(1)]
    bad = [Fraction(0), Fraction(1), Fraction(0)]
    for workers in (0, 2):
        shares = Shares(good, good, bad, ramp=Fraction(0), late_from=3)
        batching = Batching(length=LENGTH, packing="concat", window_tokens=100)
        rows = Sampler(views, shares, batching, seed=1, bookmarks={name: Bookmark() for name in NAMES}, workers=workers)
        with rows:
            assert [next(rows).source for _ in range(3)] == ["answers"] * 3
            with pytest.raises(ValueError, match="damaged"):
                next(rows)
    assert threading.active_count() == before


def test_impossible_arguments_are_refused() -> None:
    for options in ({"seed": -1}, {"workers": -1}, {"rank": 2, "ranks": 2}):
        with pytest.raises(ValueError, match="none may be below 0"):
            sampler(**options)
    for length, tokens in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Batching(length=length, packing="concat", window_tokens=tokens)
