"""Who holds the others up, judged from made-up beats: right ranks named, and nobody where nothing is wrong."""

from dataclasses import replace

from parallel.verdict import BUSY, STARTING, Beat, Jury, Kind

LIMIT = 4.0
BEAT = Beat(rank=0, host="h", pid=1, number=0, phase="a step", limit=LIMIT, counts={"world": 7, "tensor": 3}, at="loop.py:1")


class Ranks:
    """Beats every half second; a rank is changed by name."""

    def __init__(self, size: int) -> None:
        self.now, self.jury = 0.0, Jury(list(range(size)), limit=LIMIT, now=0.0)
        self.beats = {rank: replace(BEAT, rank=rank) for rank in range(size)}
        self.silent: set[int] = set()

    def go(self, seconds: float, *working: int, moving: tuple[int, ...] = (), step: float = 0.5) -> tuple[Kind, list[int]] | None:
        """The first verdict within `seconds`, in which ranks `working` spend CPU time and ranks `moving` enter collectives."""
        end = self.now + seconds
        while self.now < end:
            self.now += step
            for rank, beat in self.beats.items():
                counts = {name: count + (rank in moving) for name, count in beat.counts.items()}
                if rank not in self.silent:
                    self.beats[rank] = replace(beat, number=beat.number + 1, effort=beat.effort + (rank in working), counts=counts)
            self.jury.see(self.beats, self.now)
            verdict = self.jury.judge(self.now)
            if verdict is not None:
                return verdict.kind, verdict.ranks
        return None

    def wait(self, *ranks: int, ahead: int = 1) -> None:
        for rank in ranks:
            counts = {name: count + ahead for name, count in self.beats[rank].counts.items()}
            self.beats[rank] = replace(self.beats[rank], waiting=True, counts=counts)


def test_all_move() -> None:
    assert Ranks(4).go(1000, 0, 1, 2, 3, moving=(0, 1, 2, 3)) is None


def test_who_says_nothing_is_stopped() -> None:
    ranks = Ranks(4)
    ranks.wait(0, 1, 3)
    ranks.silent = {2}
    assert ranks.go(10) == ("stopped", [2])
    assert ranks.now < LIMIT + 1.1


def test_who_is_behind_and_waits_for_nobody_is_hung() -> None:
    ranks = Ranks(4)
    ranks.wait(0, 1, 3)
    assert ranks.go(10) == ("hung", [2])
    assert ranks.now < LIMIT + 1.1


def test_who_falls_silent_while_it_stands_still_is_stopped() -> None:
    """It would be called hung, and left alive, where its last beat alone was judged."""
    ranks = Ranks(2)
    ranks.wait(0)
    assert ranks.go(1) is None
    ranks.silent = {1}
    assert ranks.go(10) == ("stopped", [1])


def test_who_waits_for_the_culprit_is_none() -> None:
    """Rank 1 waits for the hung rank 2 in one group; ranks 0 and 3 wait for rank 1 in another, where it is behind."""
    ranks = Ranks(4)
    ranks.wait(0, 3)
    ranks.beats[1] = replace(ranks.beats[1], waiting=True, counts={"world": 7, "pair": 2})
    ranks.beats[2] = replace(ranks.beats[2], counts={"world": 7, "pair": 1})
    assert ranks.go(10) == ("hung", [2])


def test_computing_is_no_hang_for_a_while() -> None:
    ranks = Ranks(2)
    ranks.wait(0)
    assert ranks.go(BUSY * LIMIT - 1, 1) is None
    assert ranks.go(5, 1) == ("hung", [1])


def test_a_phase_may_take_its_time() -> None:
    ranks = Ranks(2)
    ranks.wait(0)
    ranks.beats = {rank: replace(beat, phase="saving", limit=600.0) for rank, beat in ranks.beats.items()}
    assert ranks.go(599) is None
    assert ranks.go(5) == ("hung", [1])


def test_where_no_counter_tells_those_who_do_not_wait_are_named() -> None:
    """Between two ranks of a pipeline."""
    ranks = Ranks(3)
    ranks.wait(0, 2, ahead=0)
    assert ranks.go(10) == ("hung", [1])


def test_a_group_of_others_is_not_held_against_a_rank() -> None:
    """Rank 2 is in another group, has entered fewer there, and moves."""
    ranks = Ranks(3)
    ranks.beats[2] = replace(ranks.beats[2], counts={"tensor of rank 2": 1})
    ranks.wait(0)
    assert ranks.go(10, moving=(2,)) == ("hung", [1])


def test_all_wait_for_ever() -> None:
    ranks = Ranks(2)
    ranks.wait(0, 1)
    assert ranks.go(BUSY * LIMIT - 1) is None
    assert ranks.go(5) == ("deadlocked", [0, 1])


def test_a_judge_that_slept_charges_nobody() -> None:
    """Ctrl-Z of everything, or a laptop's lid: an hour goes by between two looks."""
    ranks = Ranks(2)
    ranks.silent = {0, 1}
    ranks.wait(0)
    assert ranks.go(2) is None
    assert ranks.go(3600, step=3600) is None
    ranks.silent = set()
    assert ranks.go(2, moving=(0, 1)) is None


def test_who_never_came() -> None:
    ranks = Ranks(3)
    del ranks.beats[1]
    assert ranks.go(STARTING - 1, moving=(0, 2)) is None
    assert ranks.go(3, moving=(0, 2)) == ("absent", [1])


def test_who_ended_well_is_not_missed() -> None:
    ranks = Ranks(2)
    ranks.beats[1] = replace(ranks.beats[1], over=True)
    ranks.silent = {1}
    assert ranks.go(100, moving=(0,)) is None
