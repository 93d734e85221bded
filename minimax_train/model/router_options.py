"""How routers are trained: over which tokens they are balanced, and whether an expert's share of them has a limit. Pure."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Unit = Literal["row", "data"]


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Of training only: a model that is evaluated drops nothing, and its counts are a row's.

    MiniMax-01 (arXiv 2501.08313) says that tokens over an expert's capacity are discarded and that routers agree across ranks
    on the counts before; the factor, what is dropped first and what weighs the rest are not published: those are ours.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    unit: Unit = "row"
    """The tokens that the balancing loss and the capacity count together: one packed row, which no layout changes, or (`data`) the rows
    that all data-parallel ranks have in flight at once."""
    capacity: float | None = None
    """An expert takes at most ceil(capacity * choices / experts) of the unit's choices, the most probable; None: every one (dropless)."""

    def __post_init__(self) -> None:
        if self.capacity is not None and not (math.isfinite(self.capacity) and self.capacity >= 1):
            raise ValueError(
                f"router.capacity is {self.capacity}; below 1 choices are dropped even at perfect balance: use a finite number from 1 on, "
                "or null to drop none"
            )

    def limit(self, choices: int, experts: int) -> int | None:
        """Choices an expert may take of a unit's; None: all. `capacity` is read as the decimal it is written as (1.1 is 11/10)."""
        return None if self.capacity is None else math.ceil(Fraction(str(self.capacity)) * choices / experts)
