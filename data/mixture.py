"""Which source gives each row of a stage: exact shares that change from row to row, and turns that never stray a whole row from them."""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from math import inf, lcm


class Shares:
    """Of m sources, the exact share of every sample n = 0, 1, ... of a stage; all integers, in units of 1 / `unit`.

    Over the first `ramp` samples (a fraction of one counts) shares go in a straight line from `begin` to `base`, taken at the middle of
    each sample: MiniMax-01's linear interpolation at transitions (arXiv 2501.08313, beside Table 6). They stay at `base` until
    `late_from`, and at `late` from there on, for ever. Each of begin, base and late sums to 1.
    """

    def __init__(
        self, begin: Sequence[Fraction], base: Sequence[Fraction], late: Sequence[Fraction], *, ramp: Fraction, late_from: int
    ) -> None:
        rows = {"begin": begin, "base": base, "late": late}
        for name, shares in rows.items():
            if sum(shares) != 1 or min(shares) < 0 or len(shares) != len(base):
                raise ValueError(f"{name} shares are {', '.join(map(str, shares))}: one for each source, 0 or more, with sum 1")
        # sample n stands at (2n + 1) / (2 ramp) of the ramp; of the integers 2n + 1 the first N sum to N^2
        double = 2 * ramp
        self._steps = max(0, -(-(double - 1) // 2)) if ramp else 0
        if self._steps > late_from:
            raise ValueError(f"the ramp ends at sample {float(ramp):g}, after the late shares begin, at {late_from}: shorten one of them")
        common = lcm(*(share.denominator for shares in rows.values() for share in shares))
        self.unit = common * (double.numerator if ramp else 1)
        self._begin, self._base, self._late = ([int(share * self.unit) for share in shares] for shares in rows.values())
        self._slope = [int((b - a) / double * self.unit) if ramp else 0 for a, b in zip(begin, base, strict=True)]
        self.late_from = late_from

    def __len__(self) -> int:
        return len(self._base)

    def gives(self, source: int) -> bool:
        """Whether `source` has a share of any sample."""
        return any(shares[source] for shares in (self._begin, self._base, self._late))

    def total(self, source: int, samples: int) -> int:
        """What `source` should have given of the first `samples` samples, in units."""
        ramp = min(samples, self._steps)
        base = min(samples, self.late_from) - ramp
        late = samples - ramp - base
        return ramp * self._begin[source] + ramp * ramp * self._slope[source] + base * self._base[source] + late * self._late[source]

    def first(self, source: int, at_least: int, *, after: int = 0) -> float:
        """The least number of samples, `after` or more, whose `total` is at least `at_least` units; infinite where it never is.

        In O(log distance).
        """
        if self._late[source] == 0 and self.total(source, self.late_from) < at_least:
            return inf
        reach = 1
        while self.total(source, after + reach) < at_least:
            reach *= 2
        low, high = after + reach // 2, after + reach
        return low + bisect_left(range(low, high), at_least, key=lambda samples: self.total(source, samples))


class Turns:
    """The source of each sample in turn, so that each one's count stays within 1 - 1/(2m - 2) of its exact share of what was given.

    R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980): no rule keeps a better bound, also for shares that change.
    A source's next turn may be taken once its exact total is ahead of its count by 1/(2m - 2), and must be by the last sample before it is
    ahead by more than 1 - 1/(2m - 2). The turn that must be taken first is taken. (Taking the source that lags most lets counts stray by
    more, as soon as there are three.) `counts` is all there is of state. Memory O(m); a sample takes O(m), and O(log) of the distance to
    the source's next turn.
    """

    def __init__(self, shares: Shares, counts: Sequence[int] | None = None) -> None:
        self.shares = shares
        self.counts = [0] * len(shares) if counts is None else list(counts)
        if len(self.counts) != len(shares) or min(self.counts) < 0:
            raise ValueError(f"counts are {self.counts}: one for each of {len(shares)} sources, 0 or more")
        self.sample = sum(self.counts)
        self._windows = [self._window(source) for source in range(len(shares))]

    def __next__(self) -> int:
        """The source of sample number `sample`."""
        ready = [(last, source) for source, (first, last) in enumerate(self._windows) if first <= self.sample]
        chosen = min(ready)[1]
        self.counts[chosen] += 1
        self.sample += 1
        self._windows[chosen] = self._window(chosen)
        return chosen

    def _window(self, source: int) -> tuple[float, float]:
        """The samples in which the source's next turn may first and must last be taken."""
        unit, count = self.shares.unit, self.counts[source]
        least = -(-unit // max(2 * len(self.shares) - 2, 1))  # 1/(2m - 2), rounded up to units as both comparisons allow
        first = self.shares.first(source, count * unit + least, after=self.sample)
        last = self.shares.first(source, (count + 1) * unit - least + 1, after=self.sample)
        return first - 1, last - 1
