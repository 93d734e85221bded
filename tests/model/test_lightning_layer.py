"""Decay slopes and the lightning layer's laws."""

import pytest

from minimax_train.model.lightning import decay_slopes


def test_slopes_of_64_heads() -> None:
    """Head factor 0.91700 to 0.00390625; layer factor 1.00001 at layer 0, 0.01267 at layer 78 of 80."""
    first = decay_slopes(64, 0, 80)
    assert first[0].item() == pytest.approx(0.91700 * 1.00001, rel=1e-5)
    assert first[-1].item() == pytest.approx(0.00390625 * 1.00001, rel=1e-6)
    assert (decay_slopes(64, 78, 80) / first).mean().item() == pytest.approx((1 / 79 + 1e-5) / 1.00001, rel=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12, 40])
def test_slopes_follow_alibi_for_any_head_count(heads: int) -> None:
    """ALiBi's published construction (arXiv 2108.12409, released code): closest power of two, then every other of twice as many."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-8 / n)
        return [start * start**i for i in range(n)]

    closest = 1 << (heads.bit_length() - 1)
    expected = power_of_two(closest) + power_of_two(2 * closest)[0::2][: heads - closest]
    assert decay_slopes(heads, 0, 8).tolist() == pytest.approx([s * 1.00001 for s in expected], rel=1e-6)


def test_one_layer_has_slopes_too() -> None:
    """The released code divides by layers - 1."""
    assert decay_slopes(4, 0, 1)[0].item() == pytest.approx(0.25 * 1.00001)
