"""How ranks are shared out: world = pipeline * data * context * tensor = pipeline * expert_data * expert_tensor * expert."""

from dataclasses import dataclass
from typing import Literal

Exchange = Literal["auto", "gather", "transpose", "pruned"]
Owners = Literal["zigzag", "balanced"]

DEGREES = ("tensor", "pipeline", "context", "expert", "expert_tensor")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism; data and expert-data parallelism are what is left of the world.

    Experts have a layout of their own inside a pipeline stage: `expert` ranks share the experts out, `expert_tensor` ranks
    share each expert.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    virtual_pipeline: int = 1
    """Chunks of layers that a pipeline rank holds, far apart in the model: interleaved 1F1B, with a bubble so many times shorter."""
    token_groups: int = 0
    """Groups of tokens whose exchange with the experts overlaps with another group's compute; 0: by the rows an expert gets."""
    key_value: int = 1
    """Of the `context` ranks, so many neighbours (of one node) share out the key-value heads; the ring runs over the rest."""
    exchange: Exchange = "auto"
    """How lightning layers pass states between context ranks; auto: for each row and layer what sends the fewest bytes."""
    decay_cut: float = 104.0
    """A state passes on beyond the next piece only in heads whose decay over a piece is more than exp(-decay_cut); at 104 what is left
    out is 0.0 in fp32. Of the pruned exchange."""
    owners: Owners = "zigzag"
    """Which context rank holds which pieces of a row: zigzag, or balanced for the row's documents."""

    def __post_init__(self) -> None:
        for name in (*DEGREES, "virtual_pipeline", "key_value"):
            degree = getattr(self, name)
            if degree < 1:
                raise ValueError(f"layout.{name} is {degree}; it must be at least 1")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"layout.virtual_pipeline is {self.virtual_pipeline}, layout.pipeline 1: only pipeline ranks take turns; set it to 1"
            )
        if self.token_groups < 0:
            raise ValueError(f"layout.token_groups is {self.token_groups}; use at least 1, or 0 to go by the rows an expert gets")
        if not self.decay_cut > 0:
            raise ValueError(f"layout.decay_cut is {self.decay_cut}; it must be above 0 (104 leaves out nothing that fp32 can hold)")
        if self.context % self.key_value:
            raise ValueError(
                f"layout.key_value is {self.key_value}, layout.context {self.context}: key_value ranks are neighbours among the context "
                "ranks, so it must divide context"
            )

    @property
    def dense(self) -> int:
        """Ranks that hold one copy of the dense weights' work: pipeline * context * tensor."""
        return self.pipeline * self.context * self.tensor

    @property
    def chunks(self) -> int:
        """Parts that the layers are cut into; pipeline rank r holds chunks r, r + pipeline, ..."""
        return self.pipeline * self.virtual_pipeline

    @property
    def pieces(self) -> int:
        """Pieces a row is cut into: two for each context rank, or the whole row."""
        return 2 * self.context if self.context > 1 else 1

    def data(self, world: int) -> int:
        """Data-parallel degree in a world of `world` ranks; ValueError where the layout does not fit."""
        experts = self.pipeline * self.expert * self.expert_tensor
        for name, ranks in (("pipeline*context*tensor", self.dense), ("pipeline*expert*expert_tensor", experts)):
            if world % ranks:
                raise ValueError(f"{world} ranks were started, not a multiple of {name} = {ranks}: change the ranks or the layout")
        return world // self.dense

    def check_length(self, name: str, tokens: int) -> None:
        """ValueError where a row of `tokens` tokens cannot be shared out evenly."""
        for divisor, why in (
            (self.pieces, "2 * layout.context pieces"),
            (self.context * self.tensor, "layout.context * layout.tensor ranks"),
        ):
            if tokens % divisor:
                nearest = max(tokens // divisor, 1) * divisor
                raise ValueError(f"{name} is {tokens}, not a multiple of {divisor} ({why}): use {nearest}, or change the layout")
