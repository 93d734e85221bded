"""How ranks are shared out: world = pipeline * data * context * tensor = pipeline * expert_data * expert_tensor * expert."""

from dataclasses import dataclass, fields


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

    def __post_init__(self) -> None:
        for field in fields(self):
            degree = getattr(self, field.name)
            if degree < 1:
                raise ValueError(f"layout.{field.name} is {degree}; it must be at least 1")
            if degree > 1:
                raise ValueError(
                    f"layout.{field.name} is {degree}; this version runs data parallelism only: set it to 1 and use more ranks"
                )

    @property
    def dense(self) -> int:
        """Ranks that hold one copy of the dense weights' work: pipeline * context * tensor."""
        return self.pipeline * self.context * self.tensor

    def data(self, world: int) -> int:
        """Data-parallel degree in a world of `world` ranks; ValueError where the layout does not fit."""
        experts = self.pipeline * self.expert * self.expert_tensor
        for name, ranks in (("pipeline*context*tensor", self.dense), ("pipeline*expert*expert_tensor", experts)):
            if world % ranks:
                raise ValueError(f"{world} ranks were started, not a multiple of {name} = {ranks}: change the ranks or the layout")
        return world // self.dense
