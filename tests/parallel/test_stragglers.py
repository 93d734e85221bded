"""The slowest rank of each phase."""

from parallel.stragglers import SLOW, slowest
from parallel.verdict import Beat


def beats(*work: dict[str, float]) -> dict[int, Beat]:
    return {r: Beat(rank=r, host=f"n{r}", pid=1, number=1, phase="a step", limit=1.0, work=w) for r, w in enumerate(work)}


def test_the_slowest_rank_by_phase() -> None:
    before = beats(*[{"a step": 10.0}] * 4)
    now = beats({"a step": 14.0, "saving": 0.2}, {"a step": 14.3}, {"a step": 18.0}, {"a step": 14.1, "saving": 0.4})
    (one,) = slowest(before, now)  # of saving there is too little to say
    assert (one.phase, one.rank, one.host, one.seconds) == ("a step", 2, "n2", 8.0)
    assert one.score < SLOW
    assert "rank 2 on n2 was at work 8.0 s, the median rank 4.2 s" in str(one)


def test_equal_ranks_score_one() -> None:
    (one,) = slowest(beats(*[{}] * 3), beats(*[{"a step": 5.0}] * 3))
    assert one.score == 1.0


def test_nothing_to_compare() -> None:
    assert slowest({}, beats({"a step": 5.0})) == []
