"""What is worked out from a row's documents is worked out once per row, not once per layer."""

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

T = TypeVar("T")


class Remembers:
    """A row's facts, which never change, and what layers have worked out from them: it is forgotten together with the row."""

    @cached_property
    def _known(self) -> dict[Hashable, Any]:
        return {}

    def once(self, key: Hashable, work: Callable[[], T]) -> T:
        """work() of the first call with this `key`, which must say all that the result depends on besides these facts."""
        if key not in self._known:
            self._known[key] = work()
        known: T = self._known[key]
        return known
