"""The learning rate at the milestones of a stage."""

import pytest

from minimax_train.plan import LearningRate, Stage
from minimax_train.train.schedule import learning_rate


def stage(**rate: object) -> Stage:
    """100 steps of 10 tokens."""
    return Stage(name="s", length=5, rope_base=1e4, tokens=1000, batch_tokens=10, learning_rate=LearningRate(**rate))  # type: ignore[arg-type]


def test_warm_up_stable_decay() -> None:
    s = stage(peak=1.0, start=0.2, warmup_steps=4, final=0.1, decay_tokens=200)
    assert [learning_rate(s, i) for i in range(5)] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])
    assert learning_rate(s, 79) == 1.0
    assert learning_rate(s, 80) == pytest.approx(1 - 0.9 / 20)  # the first of the last 20 steps
    assert learning_rate(s, 99) == pytest.approx(0.1)


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.55), ("cosine", 0.55), ("exponential", 0.1**0.5)])
def test_decay_shapes_at_half_way_and_end(shape: str, half: float) -> None:
    s = stage(peak=1.0, final=0.1, decay_tokens=1000, decay=shape)
    assert learning_rate(s, 49) == pytest.approx(half)
    assert learning_rate(s, 99) == pytest.approx(0.1)


def test_minimax_exponential_rate() -> None:
    """1.3e-4 to 3e-5 over 1T tokens is a rate of ln(1.3e-4/3e-5) = 1.466 per 1T (MiniMax-01 section 4)."""
    s = stage(peak=1.3e-4, final=3e-5, decay_tokens=1000, decay="exponential")
    assert learning_rate(s, 29) == pytest.approx(1.3e-4 * 2.718281828 ** (-1.4663 * 0.3), rel=1e-4)
