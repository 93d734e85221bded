"""Packed rows for tests: where documents begin, against where pieces do."""

import itertools

from hypothesis import strategies as st

TOKENS = 96  # divides into the pieces of 1, 2, 4 and 8 context ranks

ROWS: dict[str, tuple[int, ...]] = {
    "one document": (0, 96),
    "on borders": (0, 12, 24, 48, 96),
    "before and after borders": (0, 11, 13, 47, 49, 95, 96),
    "one-token documents": (0, 1, 2, 3, 11, 12, 13, 50, 51, 96),
    "long in the middle": (0, 5, 90, 96),
    "short": tuple(range(0, 97, 4)),
}
"""Name -> cu_seqlens of 96 tokens."""
EMPTY = (0, 0, 12, 12, 12, 35, 35, 60, 96, 96)
"""Empty documents at both ends of the row, on a border of pieces and inside a piece."""


@st.composite
def packings(draw: st.DrawFn) -> tuple[int, ...]:
    """cu_seqlens of 96 tokens: few or many documents, some of one token, some empty."""
    borders = draw(st.sets(st.integers(1, TOKENS - 1), max_size=12))
    near = draw(st.sets(st.sampled_from([b + d for b in range(6, TOKENS - 6, 6) for d in (-1, 0, 1)]), max_size=6))
    empty = draw(st.lists(st.sampled_from(sorted({0, *borders, *near, TOKENS})), max_size=2))
    return (0, *sorted([*borders, *near, *empty]), TOKENS)


def drawn(number: int) -> list[tuple[int, ...]]:
    """The rows above and `number` packings more, always the same: ranks are started once for all of them."""
    from hypothesis import HealthCheck, Phase, given, settings

    rows: list[tuple[int, ...]] = []

    @settings(max_examples=number, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(packings())
    def collect(row: tuple[int, ...]) -> None:
        rows.append(row)

    collect()
    return list(itertools.chain(ROWS.values(), [EMPTY], rows))
