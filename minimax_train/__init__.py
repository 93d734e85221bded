"""Continued pretraining and context extension for MiniMax-type hybrid lightning-attention MoE models."""

from importlib.util import find_spec
from pathlib import Path

_HOME = Path(__file__).resolve().parent.parent


def _refuse_strangers() -> None:
    """`data` and `parallel` are common names: refuse to start when they resolve to somebody else's package."""
    for room in ("data", "parallel"):
        spec = find_spec(room)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is not None and origin != _HOME / room / "__init__.py":
            raise ImportError(
                f"the package {room!r} resolves to {origin}, not to {_HOME / room}: install minimax-train into an environment of its own"
            )


_refuse_strangers()
