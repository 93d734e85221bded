"""Shares and turns, held against exact fractions at every sample."""

from fractions import Fraction
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import Shares, Turns


@st.composite
def stages(draw: st.DrawFn) -> tuple[Shares, list[list[Fraction]]]:
    """Shares of up to five sources, and those of samples 0 ... 199 worked out one by one."""
    sources = draw(st.integers(1, 5))
    weights = st.lists(st.integers(0, 30), min_size=sources, max_size=sources).filter(any)
    begin, base, late = ([Fraction(w, sum(ws)) for w in ws] for ws in (draw(weights), draw(weights), draw(weights)))
    late_from = draw(st.integers(1, 200))
    ramp = Fraction(draw(st.integers(0, 7 * late_from)), 7)
    each = []
    for n in range(200):
        t = min(Fraction(1), Fraction(2 * n + 1) / (2 * ramp)) if ramp else Fraction(1)
        each.append(late if n >= late_from else [b * (1 - t) + c * t for b, c in zip(begin, base, strict=True)])
    return Shares(begin, base, late, ramp=ramp, late_from=late_from), each


@settings(max_examples=60)
@given(stages())
def test_counts_stay_within_one_sample_of_exact(stage: tuple[Shares, list[list[Fraction]]]) -> None:
    """At every sample through ramp, plateau and late part, and by Tijdeman's bound, which is below 1."""
    shares, each = stage
    turns, exact, sources = Turns(shares), [Fraction(0)] * len(shares), len(shares)
    bound = 1 - Fraction(1, 2 * sources - 2) if sources > 1 else 0
    for n, now in enumerate(each):
        exact = [a + b for a, b in zip(exact, now, strict=True)]
        assert [Fraction(shares.total(i, n + 1), shares.unit) for i in range(sources)] == exact
        chosen = next(turns)
        assert sum(turns.counts) == n + 1
        assert all(abs(count - share) <= bound < 1 for count, share in zip(turns.counts, exact, strict=True))
        assert now[chosen] or exact[chosen]


@given(stages(), st.integers(0, 199))
def test_turns_go_on_from_their_counts(stage: tuple[Shares, list[list[Fraction]]], stop: int) -> None:
    turns = Turns(stage[0])
    for _ in range(stop):
        next(turns)
    again = Turns(stage[0], turns.counts)
    assert [next(again) for _ in range(100)] == [next(turns) for _ in range(100)]


def test_the_one_that_lags_most_is_not_good_enough() -> None:
    """Why Tijdeman's rule: here the simple one strays by more than a sample, while his keeps 7/8."""
    begin, base, late = (
        [Fraction(w, sum(ws)) for w in ws] for ws in ((2, 0, 1, 0, 1), (20, 50, 1, 50, 1), (50, 50, 1, 1, 1))
    )  # fmt: skip
    shares = Shares(begin, base, late, ramp=Fraction(4), late_from=6)
    turns, greedy = Turns(shares), [0] * 5
    strayed = {"greedy": Fraction(0), "turns": Fraction(0)}
    for n in range(9):
        exact = [Fraction(shares.total(i, n + 1), shares.unit) for i in range(5)]
        greedy[max(range(5), key=lambda i: exact[i] - greedy[i])] += 1
        next(turns)
        for name, counts in (("greedy", greedy), ("turns", turns.counts)):
            strayed[name] = max(strayed[name], *(abs(a - b) for a, b in zip(exact, counts, strict=True)))
    assert strayed["turns"] <= Fraction(7, 8) < 1 < strayed["greedy"]


def test_a_long_stage_needs_neither_memory_nor_time() -> None:
    """10^12 samples: what a stage of that length should give, and going on in its middle, at once."""
    begin, base, late = ([Fraction(w, 10) for w in ws] for ws in ((10, 0, 0), (3, 7, 0), (3, 6, 1)))
    rows = 10**12
    shares = Shares(begin, base, late, ramp=Fraction(rows, 10), late_from=rows * 8 // 10)
    assert sum(shares.total(i, rows) for i in range(3)) == rows * shares.unit
    middle = [shares.total(i, rows // 2) // shares.unit for i in range(3)]
    middle[0] += rows // 2 - sum(middle)
    turns = Turns(shares, middle)
    for _ in range(1000):
        next(turns)
    assert turns.counts[2] == 0
    assert shares.first(2, 1) == rows * 8 // 10 + 1
    assert shares.first(2, 10 * shares.unit) == rows * 8 // 10 + 100
    assert Shares(base, base, base, ramp=Fraction(0), late_from=5).first(2, 1) == inf


def test_impossible_shares_are_refused() -> None:
    half, one = [Fraction(1, 2)] * 2, [Fraction(1), Fraction(0)]
    for wrong in ([Fraction(1, 2)], [Fraction(1)] * 2, [Fraction(-1), Fraction(2)]):
        with pytest.raises(ValueError, match="shares are"):
            Shares(half, wrong, half, ramp=Fraction(0), late_from=0)
    with pytest.raises(ValueError, match="ramp ends at sample 7"):
        Shares(half, one, one, ramp=Fraction(7), late_from=6)
    with pytest.raises(ValueError, match="counts are"):
        Turns(Shares(half, one, one, ramp=Fraction(0), late_from=6), [1])
