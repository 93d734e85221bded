"""Figures as a reader wants them: the same words in tables, plots and alternative texts."""

from json import dumps
from math import isfinite

NOT_MEASURED = "not measured"


def nats(value: float | None) -> str:
    """A loss: 3.412; says so when it was not measured (None) or is not finite."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.3f}".replace("-", "−") if isfinite(value) else "not finite"


def difference(before: float | None, after: float | None) -> float | None:
    """after - before, None when one of them was not measured."""
    return None if before is None or after is None else after - before


def change(value: float | None) -> str:
    """A difference of losses with its sign: −0.033; says so when it was not measured or is not finite."""
    return f"{value:+.3f}".replace("-", "−") if value is not None and isfinite(value) else nats(value)


def count(value: float | None) -> str:
    """A whole number: 1,146,880."""
    return NOT_MEASURED if value is None else f"{value:,.0f}"


def decimal(value: float, _: object = None) -> str:
    """1,200,000 as 1.2M; 20,000 as 20K (K = 1,000). The second argument is a tick's number."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def binary(value: float, _: object = None) -> str:
    """8192 as 8K (K = 1,024). The second argument is a tick's number."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def brief(value: int) -> str:
    """All digits below a billion, then 3.574T."""
    return count(value) if value < 1e9 else decimal(value)


def duration(seconds: float) -> str:
    """42 s, 12 min 5 s, 3 h 20 min, 739 h."""
    if not isfinite(seconds):
        return "not finite"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 6000 else f"{minutes // 60:,} h"


def fact(value: object) -> str:
    """Any value of run.json."""
    if value is None:
        return "not known"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else dumps(value, ensure_ascii=False)
