"""A plan: every number of a run, as strict frozen records. `recipe.py` loads, checks and prints it.

Units: lengths and batches in tokens, learning rates per step, RoPE bases without unit. Fields without a source are ours.
"""

from dataclasses import dataclass, field
from typing import Literal

from minimax_train.kernels.grouped_linear import Asked
from minimax_train.limits import at_least
from minimax_train.model.config import ModelConfig
from minimax_train.model.router_options import RouterOptions
from minimax_train.model.stages import Cut, cut_layers
from minimax_train.sources import Data, Mixture, Source
from minimax_train.stage import Batch, LearningRate, Plateau, Stage
from parallel.heads import check_heads
from parallel.layout import Layout

__all__ = [
    "Batch",
    "Checkpoints",
    "CriticalBatch",
    "Data",
    "LearningRate",
    "Mixture",
    "Optimizer",
    "Plan",
    "Plateau",
    "Source",
    "Stage",
    "Start",
    "Validation",
]

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW. Betas and weight decay: MiniMax-01 (arXiv 2501.08313 section 4); eps and the clip are ours (not published)."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        at_least("optimizer", self, beta1=0, beta2=0, eps=0, weight_decay=0, clip_grad=0)
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise ValueError(f"optimizer.beta1 and beta2 are {self.beta1} and {self.beta2}; they must be below 1")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the run begins: from drawn weights, or from a checkpoint's."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    checkpoint: str | None = None
    """A checkpoint folder, as `train` or `convert from-hf` writes it. Its architecture must be the plan's; its RoPE base may only rise."""
    optimizer: Literal["fresh", "carry"] = "fresh"
    """`carry` takes the optimizer's moments along too (from a training checkpoint)."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When a checkpoint is written and how many are kept. The end of every stage is always written and kept."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    every_steps: int = 100
    asynchronous: bool = True
    """Training goes on while one is being written. The last one, a stage's last, and one that was asked for are always waited for."""
    keep: int = 2
    """The newest ones that stay."""
    keep_every_tokens: int | None = None
    """Besides, the first checkpoint at or beyond every multiple of so many tokens stays; null: none for this reason."""
    mirror: str | None = None
    """A folder, on another file system, in which the folder NAME-OF-RUN gets copies, and keeps as many; null: none."""

    def __post_init__(self) -> None:
        at_least("checkpoints", self, every_steps=1, keep=1)
        if self.keep_every_tokens is not None:
            at_least("checkpoints", self, keep_every_tokens=1)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """When the held-out documents are scored, besides the start and the end of every stage."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    every_steps: int = 100
    tokens: int = 100_000
    """At most this many held-out tokens are used (whole rows; at least one)."""

    def __post_init__(self) -> None:
        at_least("validation", self, every_steps=1, tokens=1)


@dataclass(frozen=True, kw_only=True)
class CriticalBatch:
    """The batch beyond which more tokens a step no longer save steps, as a power of the loss: tokens_at_one * loss^-power.

    A rule that speaks and changes nothing: every validation says what it asks for. MiniMax-01 doubled its batch by such a fit, at losses of
    2.22, 1.98, 1.77 and 1.58 (arXiv 2501.08313, figure 13).
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    tokens_at_one: float
    """At a loss of 1 nat per token."""
    power: float

    def __post_init__(self) -> None:
        at_least("critical_batch", self, tokens_at_one=1, power=0)

    def tokens(self, loss: float) -> float:
        """At this loss, which is above 0."""
        return self.tokens_at_one * float(loss**-self.power)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Which steps are not applied: see train/guard.py."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    sigmas: float | None = 6.0
    """Standard deviations above the mean from which a gradient norm or a loss is an outlier; null: only what is no number is refused."""
    window: int = 128
    """Steps that mean and deviation are of."""
    least: int = 64
    """Steps of a stage before which nothing is an outlier: norms fall while the rate warms up."""
    most: int = 3
    """Refused steps in a row that the run bears; at one more it goes back to its last checkpoint. Ours."""
    checksum_every: int = 10
    """Steps after which weights that several ranks hold are compared, and from which to the next step the optimizer's state is; so it is in
    every step that is saved. 0: never. Ours."""
    rewinds: int = 2
    """Times in a stage that it goes back, leaving out the rows it has read since the checkpoint (PaLM's remedy, arXiv 2204.02311 section
    5.1); then it stops. Ours."""

    def __post_init__(self) -> None:
        at_least("guard", self, window=2, least=2, most=0, rewinds=0, checksum_every=0)
        if self.sigmas is not None:
            at_least("guard", self, sigmas=1)
        if self.least > self.window:
            raise ValueError(f"guard.least is {self.least}; it must be at most guard.window, {self.window}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run: the model, its data, and the stages it goes through."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    name: str
    model: ModelConfig
    data: Data
    stages: tuple[Stage, ...]
    seed: int = 1234
    device: Literal["cpu", "cuda"] = "cuda"
    precision: Precision = "bf16"
    deterministic: bool = False
    """On CUDA, only kernels that give the same bits every time, and an error where an operator has none: slower, for looking into a fault.
    CPU ranks always give the same bits."""
    fp32_head: bool = False
    """Multiply the LM head in fp32, as MiniMax-M1 does for its RL (arXiv 2506.13585 section 3.2)."""
    experts_backend: Asked = "auto"
    """Form of the experts' products: loop, grouped (torch's), te (Transformer Engine's), or auto, the better of the first two."""
    auxiliary_loss: float = 0.01
    """Coefficient of the router's balancing loss, which is 1 per layer at balance. Ours: MiniMax's 0.01 multiplies another form."""
    router: RouterOptions = field(default_factory=RouterOptions)
    steps: int | None = None
    """Upper bound on optimizer steps over the whole run."""
    layout: Layout = field(default_factory=Layout)
    """Of every stage that has none of its own."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    guard: Guard = field(default_factory=Guard)
    critical_batch: CriticalBatch | None = None
    start: Start = field(default_factory=Start)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self) -> None:
        at_least("plan", self, auxiliary_loss=0)
        if not self.stages:
            raise ValueError("stages is empty; a plan needs at least one")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages are called {names}; every stage needs a name of its own")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"steps is {self.steps}; it must be at least 0")
        for stage in self.stages:
            layout = stage.layout or self.layout
            self.model.check_tensor(layout.tensor)
            self.model.check_experts(layout.expert, layout.expert_tensor)
            check_heads(self.model.num_key_value_heads // layout.tensor, layout.key_value)
            layout.check_length(f"stage {stage.name!r}: length", stage.length)
            self._check_mixture(stage)
            self.cut(layout)  # refuses more pipeline ranks than layers

    def _check_mixture(self, stage: Stage) -> None:
        """Refuses sources that `data` does not have, and weights that cannot be worked out."""
        owner, known = f"stage {stage.name!r}", self.data.by_name
        if stage.mixture is None:
            if len(known) > 1:
                raise ValueError(f"{owner}: mixture is null, but data.sources has {', '.join(known)}: say mixture.weights of them")
            return
        for name in (*stage.mixture.weights, *stage.mixture.late):
            if name not in known:
                raise ValueError(f"{owner}: mixture names source {name!r}; data has {', '.join(known)}: use one of these, or add it there")
        if stage.mixture.ramp_tokens and stage is self.stages[0]:
            raise ValueError(f"{owner}: mixture.ramp_tokens is {stage.mixture.ramp_tokens}, but no stage comes before it: set it to 0")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        planned = sum(stage.steps for stage in self.stages)
        return planned if self.steps is None else min(planned, self.steps)

    def layout_of(self, stage: int) -> Layout:
        """The layout of the plan's stage number `stage`; behind the last one, the last one's."""
        return self.stages[min(stage, len(self.stages) - 1)].layout or self.layout

    def cut(self, layout: Layout) -> Cut:
        """Which layers each pipeline rank holds under one of the plan's layouts: balanced for its longest rows, which cost the most."""
        lengths = [stage.length for stage in self.stages if (stage.layout or self.layout) == layout]
        return cut_layers(self.model, layout, max(lengths or [stage.length for stage in self.stages]))

    def check_ranks(self, ranks: int, only: str | None = None) -> None:
        """Refuses a number of ranks that a layout or a batch of the stages (or of the one named) does not divide into."""
        for number, stage in enumerate(self.stages):
            if only in (None, stage.name):
                self.check_stage_ranks(number, ranks)

    def check_stage_ranks(self, number: int, ranks: int) -> None:
        """The same of stage number `number` alone."""
        stage, layout = self.stages[number], self.layout_of(number)
        data = layout.data(ranks)
        for size in dict.fromkeys(part.batch_tokens for part in stage.parts):
            rows = size // stage.length
            if rows % data:
                raise ValueError(
                    f"stage {stage.name!r}: {rows} rows in a batch (batch_tokens {size} / length {stage.length}) do not divide over "
                    f"{data} data-parallel ranks: change batch_tokens or the ranks"
                )
            if layout.virtual_pipeline > 1 and rows // data % layout.pipeline:
                raise ValueError(
                    f"stage {stage.name!r}: {rows // data} rows in a batch for each of {data} data-parallel ranks, not a multiple of "
                    f"layout.pipeline {layout.pipeline}, as interleaving needs: change batch_tokens, or set "
                    "layout.virtual_pipeline=1"
                )
