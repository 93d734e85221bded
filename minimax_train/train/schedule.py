"""The learning rate, a pure function of the stage and the step in it."""

import math

from minimax_train.plan import Stage


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of the stage's step `step` (0-based): warm-up, stable, decay. All by tokens, so that a batch that grows changes nothing.

    Warm-up reaches the peak on its last step. A plateau begins with the first step at or behind its token; the decay starts from the last
    one. Over the decay, x in (0, 1] is the share of `decay_tokens` used up at the end of the step: linear peak + x (final - peak); cosine
    final + (peak - final)(1 + cos(pi x))/2; exponential peak (final/peak)^x.
    """
    rate = stage.learning_rate
    if step < rate.warmup_steps:
        return rate.start + (rate.peak - rate.start) * (step + 1) / rate.warmup_steps
    after = stage.tokens_at(step + 1)
    remaining = stage.whole_tokens - after
    if remaining >= rate.decay_tokens:
        return rate.constant(stage.tokens_at(step))
    peak = rate.last
    x = 1.0 - remaining / rate.decay_tokens
    match rate.decay:
        case "linear":
            return peak + x * (rate.final - peak)
        case "cosine":
            return rate.final + (peak - rate.final) * (1 + math.cos(math.pi * x)) / 2
        case "exponential":
            return peak * (rate.final / peak) ** x
