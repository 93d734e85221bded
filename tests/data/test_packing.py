"""Packing: every token of a window in exactly one row, nothing split without need, and rows that say so rightly."""

import itertools
from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import FILLING, assemble
from data.packing import Packing, Window, best_fit_decreasing, plan_window
from data.shuffle import shuffled
from data.stream import Stream
from tests.data.in_memory import check_row, places_of, segments, stream_of

documents = st.lists(st.integers(1, 30), min_size=1, max_size=12)
packings = st.sampled_from(("concat", "best_fit"))


def stream_places(stream: Stream, begin: int, end: int) -> list[int]:
    """Tokens begin ... end - 1 of the stream as places in the dataset, straight from its definition."""
    places = []
    for epoch in range(end // stream.size + 1):
        for d in shuffled(len(stream.view.lengths), seed=stream.seed, epoch=epoch):
            number = stream.view.documents[d]
            places += range(stream.view.dataset.offsets[number], stream.view.dataset.offsets[number + 1])
    return places[begin:end]


@given(lengths=documents, length=st.integers(1, 70), seed=st.integers(0, 5), tokens=st.integers(1, 100), packing=packings)
def test_windows_hold_every_token_of_the_stream_once(lengths: list[int], length: int, seed: int, tokens: int, packing: Packing) -> None:
    """Three windows end to end; each row is what Row promises, of exactly `length` tokens, and counted rightly."""
    stream, begin = stream_of(lengths, seed), 0
    for _ in range(3):
        window = plan_window(stream, begin, length=length, packing=packing, window_tokens=tokens)
        assert window.begin == begin
        assert window.end - begin >= max(1, max(length, min(tokens, stream.size)) - (length - 1 if packing == "concat" else 0))
        found = []
        for number in range(window.rows):
            row = assemble(stream.view.dataset, window.row(number), length)
            assert len(row.tokens) == length
            check_row(stream.view.dataset, row)
            held = places_of(stream.view, row)
            assert len(held) == window.tokens[number] > 0
            found += held
        assert sorted(found) == sorted(stream_places(stream, begin, window.end))
        begin = window.end


@given(lengths=documents, length=st.integers(1, 40), tokens=st.integers(1, 200))
def test_best_fit_splits_only_documents_longer_than_a_row(lengths: list[int], length: int, tokens: int) -> None:
    stream = stream_of(lengths, 1)
    window = plan_window(stream, 0, length=length, packing="best_fit", window_tokens=tokens)
    split = 0
    for number in range(window.rows):
        for document, start, stop in zip(*(getattr(window.row(number), n).tolist() for n in ("documents", "starts", "stops")), strict=True):
            whole = lengths[document]
            if whole <= length:
                assert (start, stop) == (0, whole)
            else:
                assert start % length == 0
                assert stop == min(whole, start + length)
                split += start == 0
    assert window.split.sum() == split


@given(lengths=documents, length=st.integers(1, 40), tokens=st.integers(1, 200))
def test_concat_rows_are_the_cuts_of_the_stream(lengths: list[int], length: int, tokens: int) -> None:
    """No padding, nothing dropped; rows are the cuts in the recorded random order; a document cut by two edges counts once."""
    stream = stream_of(lengths, 2)
    begin = 3 * length  # begins anywhere, also inside a document
    window = plan_window(stream, begin, length=length, packing="concat", window_tokens=tokens)
    assert (window.end - begin) % length == 0
    assert (window.tokens == length).all()
    cuts = [stream_places(stream, begin + i * length, begin + (i + 1) * length) for i in range(window.rows)]
    rows = [assemble(stream.view.dataset, window.row(number), length) for number in range(window.rows)]
    assert [places_of(stream.view, row) for row in rows] == [cuts[i] for i in window.order]
    begun = [(d, s, n) for row in rows for d, s, n in zip(row.documents, row.starts, np.diff(row.cu_seqlens), strict=True) if s == 0]
    assert window.split.sum() == sum(n < lengths[d] for d, _, n in begun)


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60), room=st.integers(20, 40))
def test_best_fit_decreasing_is_the_textbook_rule(sizes: list[int], room: int) -> None:
    """Against the rule carried out literally: same fill of bins; and against the volume bound."""
    gaps: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, gap in enumerate(gaps) if gap >= size]
        if not fitting:
            gaps.append(room)
        best = min(fitting, key=lambda i: gaps[i]) if fitting else len(gaps) - 1
        gaps[best] -= size
    bins = best_fit_decreasing(np.array(sizes), room)
    assert sorted(set(bins.tolist())) == list(range(len(gaps)))
    assert sorted(np.bincount(bins, weights=sizes).tolist()) == sorted(room - gap for gap in gaps)


def test_best_fit_wastes_little() -> None:
    """2 M tokens of log-normal documents in rows of 8,192: below 1 % is filled up."""
    draw = np.random.Generator(np.random.Philox(1))
    lengths = np.minimum(draw.lognormal(6.5, 1.4, 2000).astype(int) + 1, 100_000)
    stream = stream_of(lengths.tolist(), 0)
    window = plan_window(stream, 0, length=8192, packing="best_fit", window_tokens=2**26)
    assert window.end == stream.size
    assert 0.99 < window.tokens.sum() / (window.rows * 8192) <= 1


@pytest.mark.parametrize(("largest", "room"), [(2048, 2048), (5000, 2**20), (600, 1000)])
def test_best_fit_searches_once_a_document_in_a_short_list(monkeypatch: pytest.MonkeyPatch, largest: int, room: int) -> None:
    """So it is linear: at most one search a document, among at most 2 sqrt(window) gaps."""
    searched: list[int] = []

    def counting(gaps: list[int], size: int) -> int:
        searched.append(len(gaps))
        return bisect_left(gaps, size)

    monkeypatch.setattr("data.packing.bisect_left", counting)
    sizes = np.random.Generator(np.random.Philox(3)).integers(1, largest + 1, 30_000)
    best_fit_decreasing(sizes, room)
    assert len(searched) <= len(sizes)
    assert max(searched) <= 2 * sizes.sum() ** 0.5


def test_rows_of_a_million_tokens() -> None:
    """2,000 documents in rows of 1,048,576, and one of three million: full rows, a rest, and positions that restart."""
    draw = np.random.Generator(np.random.Philox(2))
    stream = stream_of([*draw.integers(2, 1000, 2000).tolist(), 3_000_000], 0)
    length = 2**20
    for packing in ("concat", "best_fit"):
        window = plan_window(stream, 0, length=length, packing=packing, window_tokens=2**26)
        rows = [assemble(stream.view.dataset, window.row(number), length) for number in range(window.rows)]
        for row in rows:
            assert (np.diff(row.cu_seqlens) > 0).all()
            assert row.cu_seqlens[-1] == length
            assert (row.positions[row.cu_seqlens[:-1]] == 0).all()
            assert ((np.diff(row.positions) == 1) | (row.positions[1:] == 0)).all()
        held = np.concatenate([row.tokens[: window.tokens[i]] for i, row in enumerate(rows)])
        assert np.array_equal(np.sort(held), np.sort(stream.view.dataset.stream[: window.end]) if packing == "best_fit" else np.sort(held))
        assert len(held) == window.end


def test_neighbouring_rows_are_seldom_neighbours_in_the_stream() -> None:
    """One document of a thousand rows must not fill a thousand steps on end."""
    for packing in ("concat", "best_fit"):
        stream = stream_of([1000 * 8, *[8] * 1000], 1)
        window = plan_window(stream, 0, length=8, packing=packing, window_tokens=2**26)
        long = [0 in window.row(number).documents for number in range(window.rows)]
        assert 950 <= sum(long) <= 1050
        assert 400 <= sum(a != b for a, b in itertools.pairwise(long[:1000])) <= 600  # about half, as of a fair coin; in order: 2


def test_what_fills_a_row_is_a_segment_of_its_own() -> None:
    stream = stream_of([5, 4], 0)
    window: Window = plan_window(stream, 0, length=7, packing="best_fit", window_tokens=1)
    row = assemble(stream.view.dataset, window.row(0), 7)
    check_row(stream.view.dataset, row)
    assert row.documents[-1] == FILLING
    assert segments(row)[-1] == slice(int(window.tokens[0]), 7)


@settings(max_examples=20)
@given(lengths=documents, seed=st.integers(0, 3))
def test_a_row_longer_than_the_source_spans_epochs(lengths: list[int], seed: int) -> None:
    stream = stream_of(lengths, seed)
    length = 3 * stream.size + 1
    window = plan_window(stream, 0, length=length, packing="concat", window_tokens=1)
    row = assemble(stream.view.dataset, window.row(0), length)
    check_row(stream.view.dataset, row)
    assert places_of(stream.view, row) == stream_places(stream, 0, length)


@pytest.mark.parametrize("sizes", [[], [3], [3, 3, 3]])
def test_best_fit_of_few(sizes: list[int]) -> None:
    assert best_fit_decreasing(np.array(sizes, np.int64), 6).tolist() == [0, 0, 1][: len(sizes)]
