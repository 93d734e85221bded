"""The learning rate, a pure function of the stage and the step in it."""

import math

from minimax_train.plan import Stage


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of the stage's step `step` (0-based): warm-up, stable, decay.

    Warm-up reaches the peak on its last step. Over the decay, x in (0, 1] is the share of `decay_tokens` used up at the end of
    the step: linear peak + x (final - peak); cosine final + (peak - final)(1 + cos(pi x))/2; exponential peak (final/peak)^x.
    """
    rate = stage.learning_rate
    if step < rate.warmup_steps:
        return rate.start + (rate.peak - rate.start) * (step + 1) / rate.warmup_steps
    remaining = (stage.steps - 1 - step) * stage.batch_tokens
    if remaining >= rate.decay_tokens:
        return rate.peak
    x = 1.0 - remaining / rate.decay_tokens
    match rate.decay:
        case "linear":
            return rate.peak + x * (rate.final - rate.peak)
        case "cosine":
            return rate.final + (rate.peak - rate.final) * (1 + math.cos(math.pi * x)) / 2
        case "exponential":
            return rate.peak * (rate.final / rate.peak) ** x
