"""Bounds that a plan's numbers have to keep."""

import math


def at_least(owner: str, record: object, **lowest: float) -> None:
    """Refuses a field of `record` below its lowest value, infinite, or NaN."""
    for name, low in lowest.items():
        value = getattr(record, name)
        if not math.isfinite(value) or value < low:
            raise ValueError(f"{owner}.{name} is {value}; it must be a finite number, at least {low:g}")
