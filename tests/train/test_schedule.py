"""The learning rate at the milestones of a stage."""

import pytest

from minimax_train.plan import Batch, LearningRate, Plateau, Stage
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


def test_batches_that_grow() -> None:
    """Whole batches: one that runs over a border is the last of its size."""
    ramp = (Batch(from_tokens=95, batch_tokens=20), Batch(from_tokens=300, batch_tokens=50))
    s = Stage(name="s", length=5, rope_base=1e4, tokens=1000, batch_tokens=10, batch_ramp=ramp, learning_rate=LearningRate(peak=1.0))
    sizes = [s.batch_at(step) for step in range(s.steps)]
    assert sizes == [10] * 10 + [20] * 10 + [50] * 14
    assert [s.tokens_at(step) for step in range(s.steps + 1)] == [sum(sizes[:step]) for step in range(s.steps + 1)]
    assert (s.steps, s.whole_tokens) == (34, 1000)
    assert s.tokens_at(99) == 1000


@pytest.mark.parametrize("ramp", [(), (Batch(from_tokens=200, batch_tokens=20), Batch(from_tokens=600, batch_tokens=40))])
def test_the_rate_goes_by_tokens_whatever_the_batch(ramp: tuple[Batch, ...]) -> None:
    """Plateaus and decay stand at the same tokens with a batch that grows."""
    rate = LearningRate(peak=1.0, warmup_steps=2, plateaus=(Plateau(from_tokens=500, rate=0.5),), final=0.1, decay_tokens=200)
    s = Stage(name="s", length=5, rope_base=1e4, tokens=1000, batch_tokens=10, batch_ramp=ramp, learning_rate=rate)
    assert [learning_rate(s, step) for step in range(3)] == [0.5, 1.0, 1.0]
    for step in range(2, s.steps):
        before, after = s.tokens_at(step), s.tokens_at(step + 1)
        if after > 800:
            assert learning_rate(s, step) == pytest.approx(0.5 - 0.4 * (after - 800) / 200)
        else:
            assert learning_rate(s, step) == (0.5 if before >= 500 else 1.0)
    assert learning_rate(s, s.steps - 1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_ramp": (Batch(from_tokens=100, batch_tokens=12),)}, "batch_tokens is 12, not a multiple of length 5"),
        ({"batch_ramp": (Batch(from_tokens=100, batch_tokens=20), Batch(from_tokens=100, batch_tokens=30))}, "begin later"),
        ({"batch_ramp": (Batch(from_tokens=1000, batch_tokens=20),)}, "after the stage's 1000 tokens"),
        ({"learning_rate": LearningRate(peak=1.0, plateaus=(Plateau(from_tokens=2000, rate=1.0),))}, "after the stage's 1000 tokens"),
        ({"learning_rate": LearningRate(peak=1.0, plateaus=(Plateau(from_tokens=900, rate=1.0),), decay_tokens=200)}, "beginning, 800"),
        ({"learning_rate": LearningRate(peak=1.0, plateaus=(Plateau(from_tokens=10, rate=1.0),), warmup_steps=4)}, "end, 40"),
        ({"learning_rate": LearningRate(peak=1.0, warmup_steps=101)}, "do not fit"),
        ({"learning_rate": LearningRate(peak=1.0, warmup_steps=90, decay_tokens=200)}, "do not fit"),
    ],
)
def test_schedules_that_are_refused(change: dict[str, object], says: str) -> None:
    fields: dict[str, object] = {"name": "s", "length": 5, "rope_base": 1e4, "tokens": 1000, "batch_tokens": 10}
    with pytest.raises(ValueError, match=says):
        Stage(**{**fields, "learning_rate": LearningRate(peak=1.0), **change})  # type: ignore[arg-type]
