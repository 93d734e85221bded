"""One stage of a plan: a stretch of training at one length, its batches and its learning rate, all by tokens."""

from dataclasses import dataclass
from itertools import pairwise
from re import fullmatch
from typing import Literal

from data.packing import Packing
from minimax_train.limits import at_least
from minimax_train.model.recompute import Recompute
from minimax_train.sources import Mixture, exact
from parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """From this token of the stage on, another constant rate."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    from_tokens: int
    rate: float

    def __post_init__(self) -> None:
        at_least("plateau", self, from_tokens=1, rate=0)


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Warm-up, stable, decay inside one stage (WSD, arXiv 2404.06395): start -> peak, peak and plateaus, the last of them -> final over
    the last tokens."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    peak: float
    start: float = 0.0
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from `start` to `peak`."""
    plateaus: tuple[Plateau, ...] = ()
    """Later constant rates, in order; MiniMax-01 went from 2e-4 to 1.3e-4 when gradient norms became anomalous."""
    final: float = 0.0
    decay_tokens: int = 0
    """The stage's last tokens, over which the rate falls to `final`."""
    decay: Literal["linear", "cosine", "exponential"] = "linear"

    def __post_init__(self) -> None:
        at_least("learning_rate", self, peak=0, start=0, warmup_steps=0, final=0, decay_tokens=0)
        _check_order("learning_rate.plateaus", [plateau.from_tokens for plateau in self.plateaus])
        if self.decay == "exponential" and self.decay_tokens and not 0 < self.final <= self.last:
            raise ValueError(f"learning_rate.final is {self.final}; an exponential decay needs 0 < final <= the rate before, {self.last}")

    @property
    def last(self) -> float:
        """The constant rate before the decay."""
        return self.plateaus[-1].rate if self.plateaus else self.peak

    def constant(self, tokens: int) -> float:
        """The constant rate after `tokens` of the stage."""
        return next((plateau.rate for plateau in reversed(self.plateaus) if plateau.from_tokens <= tokens), self.peak)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """From this token of the stage on, another size of the global batch."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    from_tokens: int
    batch_tokens: int

    def __post_init__(self) -> None:
        at_least("batch_ramp", self, from_tokens=1, batch_tokens=1)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps of a stage that have one batch size: first .. first + count - 1, from token `tokens` of the stage on."""

    first: int
    count: int
    tokens: int
    batch_tokens: int


def _check_order(name: str, starts: list[int]) -> None:
    if any(later <= earlier for earlier, later in pairwise(starts)):
        raise ValueError(f"{name} begin at tokens {starts}; each must begin later than the one before")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training at one length."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    name: str
    length: int
    """Tokens in a packed row."""
    rope_base: float
    tokens: int
    """Tokens of the stage; the last batch is filled up."""
    batch_tokens: int
    """Tokens in a global batch: a multiple of length."""
    batch_ramp: tuple[Batch, ...] = ()
    """Larger batches later in the stage, in order (MiniMax-01: 16M, 32M, 64M, 128M tokens at 69B, 790B, 4.7T)."""
    learning_rate: LearningRate
    mixture: Mixture | None = None
    """None: every row is of the only source."""
    packing: Packing = "concat"
    """concat: documents one after the other, cut every `length` tokens; nothing is lost, nothing filled up. best_fit: only documents longer
    than a row are split, the others are packed so that little is filled up (arXiv 2404.10830)."""
    layout: Layout | None = None
    """How ranks share the work in this stage; None: as the plan's `layout` says. Where it differs from the stage's before, the run saves,
    and goes on from there in the new layout."""
    recompute: Recompute = "none"
    """full: a layer keeps its input alone and runs again in the backward pass; a third more work, for a fraction of the memory.
    selective: only the experts' gate and up are computed again."""

    def __post_init__(self) -> None:
        owner = f"stage {self.name!r}"
        if not fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):  # it becomes the name of files and of jobs
            raise ValueError(f"{owner}: a name has letters, digits, '.', '_' and '-', 64 at most, and begins with a letter or a digit")
        at_least(owner, self, length=1, rope_base=1, tokens=1, batch_tokens=1)
        _check_order(f"{owner}: batch_ramp", [batch.from_tokens for batch in self.batch_ramp])
        for size in (self.batch_tokens, *(batch.batch_tokens for batch in self.batch_ramp)):
            if size % self.length:
                raise ValueError(f"{owner}: batch_tokens is {size}, not a multiple of length {self.length}")
        for what, start in (("batch_ramp", self.batch_ramp), ("learning_rate.plateaus", self.learning_rate.plateaus)):
            if start and start[-1].from_tokens >= self.tokens:
                raise ValueError(f"{owner}: {what} begins at token {start[-1].from_tokens}, after the stage's {self.tokens} tokens")
        self._check_rate(owner)
        if self.mixture is not None and self.mixture.ramp_tokens > self.late_from * self.length:
            raise ValueError(
                f"{owner}: mixture.ramp_tokens is {self.mixture.ramp_tokens}; the weights must have arrived within the stage's first "
                f"{self.late_from * self.length} tokens{' (then mixture.late begins)' if self.mixture.late else ''}"
            )

    def _check_rate(self, owner: str) -> None:
        """Warm-up, plateaus and decay follow one another."""
        rate = self.learning_rate
        warm = self.tokens_at(min(rate.warmup_steps, self.steps))
        stable = self.whole_tokens - rate.decay_tokens
        if rate.warmup_steps > self.steps or warm > stable:
            raise ValueError(
                f"{owner}: warm-up of {rate.warmup_steps} steps ({warm} tokens) and decay of {rate.decay_tokens} tokens do not fit into "
                f"the stage's {self.whole_tokens} tokens"
            )
        if rate.plateaus and not warm <= rate.plateaus[0].from_tokens <= rate.plateaus[-1].from_tokens <= stable:
            raise ValueError(
                f"{owner}: learning_rate.plateaus begin at tokens {[plateau.from_tokens for plateau in rate.plateaus]}; they must lie "
                f"between the warm-up's end, {warm}, and the decay's beginning, {stable}"
            )

    @property
    def parts(self) -> tuple[Steps, ...]:
        """The stage's steps by batch size. A batch that runs over a border is whole, and the next size begins after it."""
        sizes = [self.batch_tokens, *(batch.batch_tokens for batch in self.batch_ramp)]
        ends = [*(batch.from_tokens for batch in self.batch_ramp), self.tokens]
        parts: list[Steps] = []
        step = tokens = 0
        for size, end in zip(sizes, ends, strict=True):
            count = max(0, -(-(end - tokens) // size))
            parts.append(Steps(first=step, count=count, tokens=tokens, batch_tokens=size))
            step, tokens = step + count, tokens + count * size
        return tuple(part for part in parts if part.count)

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return sum(part.count for part in self.parts)

    @property
    def whole_tokens(self) -> int:
        """Tokens of all its batches: `tokens`, rounded up to whole batches."""
        return self.tokens_at(self.steps)

    def tokens_at(self, step: int) -> int:
        """Tokens of the stage's batches before its step `step`."""
        return sum(part.batch_tokens * min(max(step - part.first, 0), part.count) for part in self.parts)

    def batch_at(self, step: int) -> int:
        """Tokens in the batch of the stage's step `step`."""
        return next(part.batch_tokens for part in reversed(self.parts) if part.first <= step)

    @property
    def late_from(self) -> int:
        """The first row of the stage in which mixture.late counts; its number of rows where there is none."""
        rows = self.whole_tokens // self.length
        late = self.mixture.late_fraction if self.mixture is not None and self.mixture.late else 0
        return rows - int(exact(late) * rows)
