"""Where a run's tokens come from: the `data` and `mixture` parts of a plan, as strict frozen records.

Weights, shares and fractions have no unit; lengths are in tokens, end-of-document token included. Fields without a source are ours.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from minimax_train.limits import at_least


@dataclass(frozen=True, kw_only=True)
class Source:
    """A token file, or the part of it whose documents have `at_least` tokens or more and (where given) fewer than `below`.

    MiniMax-01 (arXiv 2501.08313, Table 6) tells short (< 32K), medium (32K to 128K) and long (> 128K) documents apart; whether its K is
    1,000 or 1,024 is not published.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    prefix: str
    """Of `.bin`/`.idx`/`.json` as `minimax-train data prepare` writes them."""
    at_least: int = 0
    below: int | None = None

    def __post_init__(self) -> None:
        at_least(f"source {self.prefix!r}", self, at_least=0)
        if self.below is not None and self.below <= self.at_least:
            raise ValueError(f"source {self.prefix!r}: below is {self.below}; it must be more than at_least, {self.at_least}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on (`train`, one token file, or `sources`, several by name) and is scored on."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    train: str | None = None
    """The prefix of a token file: short for sources={train: {prefix: ...}}."""
    validation: str
    sources: dict[str, Source] = field(default_factory=dict)
    prepare: Literal["stdlib"] | None = None
    """Where the files are missing, make them first: `stdlib` is the running Python's own source files, as FOLDER/train and
    FOLDER/validation."""
    window_tokens: int = 2**26
    """Tokens of a source that are packed, and whose rows are shuffled, together; at least a row's, at most an epoch's."""
    workers: int = 2
    """Threads of each rank that make rows ahead of training; 0: none. Changes no row."""

    def __post_init__(self) -> None:
        at_least("data", self, window_tokens=1, workers=0)
        if (self.train is None) == (not self.sources):
            given = f"train is {self.train!r} and sources are {', '.join(self.sources) or 'none'}"
            raise ValueError(f"data: {given}; give one of them: set data.train to a token file's prefix, or to null and name data.sources")
        if self.prepare:
            self._check_prepare()

    @property
    def by_name(self) -> dict[str, Source]:
        """Every source; `train` is the only one where no others are named."""
        return self.sources or {"train": Source(prefix=str(self.train))}

    def _check_prepare(self) -> None:
        train, validation = Path(self.train or ""), Path(self.validation)
        if self.train is None or train.parent != validation.parent or (train.name, validation.name) != ("train", "validation"):
            raise ValueError(
                f"data.prepare={self.prepare} writes FOLDER/train and FOLDER/validation, but data.train is {self.train} and "
                f"data.validation {self.validation}: name them so, or set data.prepare=null"
            )


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What share of a stage's rows each source gives. MiniMax-01's mixtures are Table 6 of arXiv 2501.08313."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    weights: dict[str, float]
    """Of each source, 0 or more; divided by their sum. A source not named has 0."""
    ramp_tokens: int = 0
    """The stage's first tokens, over which weights go in a straight line from those the stage before ended with to these ("linear
    interpolation of source-specific sampling weights", MiniMax-01, beside Table 6; how many tokens is not published)."""
    late: dict[str, float] = field(default_factory=dict)
    """Shares (of 1) these sources have at the end of the stage; the others' weights share the rest. MiniMax-01, Table 6: 0.1 of
    long-context question answering in the last 20 %."""
    late_fraction: float = 0.2
    """The part of the stage's rows, at its end, in which `late` counts."""

    def __post_init__(self) -> None:
        at_least("mixture", self, ramp_tokens=0)
        for name, numbers in (("weights", self.weights), ("late", self.late)):
            for source, number in numbers.items():
                if not math.isfinite(number) or number < 0:
                    raise ValueError(f"mixture.{name}.{source} is {number}; it must be a finite number, at least 0")
        if not sum(self.weights.values()) > 0:
            raise ValueError(f"mixture.weights are {self.weights or 'none'}; at least one source needs a weight above 0")
        if not 0 < self.late_fraction <= 1:
            raise ValueError(f"mixture.late_fraction is {self.late_fraction}; it must be above 0 and at most 1")
        self._check_late()

    def _check_late(self) -> None:
        if not self.late:
            return
        total = sum(map(exact, self.late.values()))
        if total > 1:
            raise ValueError(f"mixture.late sums to {float(total):g}; these are shares of all rows: together they must be at most 1")
        others = [name for name, weight in self.weights.items() if weight > 0 and name not in self.late]
        if total < 1 and not others:
            raise ValueError(
                f"mixture.late gives {float(total):g} of the rows to {', '.join(self.late)}, and no other source has a weight to share the "
                "rest: let mixture.late sum to 1, or give another source a weight"
            )


def exact(number: float) -> Fraction:
    """The number as it is written in decimals: 0.3 is 3/10, so that shares sum to 1 and counts are whole numbers' business."""
    return Fraction(str(number))
