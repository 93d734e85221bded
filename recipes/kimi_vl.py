"""Kimi-VL's extension of its text model's context (arXiv 2504.07491, section 2.3), as a second published schedule, on a model of this kind.

Published: 0.3T tokens, 8K to 32K to 128K, RoPE base 50,000 to 800,000, a quarter long data and three quarters replay. Ours: how the tokens
are shared out over the two stages, the base of the first, batch, rates, layouts, the model.
"""

from minimax_train.plan import Data, LearningRate, Mixture, Plan, Source, Stage, Start
from parallel.layout import Layout
from recipes.ladder import hybrid_7b
from recipes.text01 import B, K, M


def extend_text() -> Plan:
    """32K, then 128K: a step of four each."""
    corpus, rate = "tokens/ladder/corpus", LearningRate(peak=6e-5, warmup_steps=20)
    shares = {"long": 25.0, "replay": 75.0}
    return Plan(
        name="kimi-vl-extend-text",
        model=hybrid_7b().model,
        data=Data(
            validation="tokens/ladder/validation",
            sources={"long": Source(prefix=corpus, at_least=32 * K), "replay": Source(prefix=corpus, below=32 * K)},
        ),
        start=Start(checkpoint="runs/hybrid-7b"),
        stages=(
            Stage(
                name="32K",
                length=32 * K,
                rope_base=800_000.0,
                tokens=150 * B,
                batch_tokens=4 * M,
                learning_rate=rate,
                mixture=Mixture(weights=shares),
                layout=Layout(context=2, expert=8),
            ),
            Stage(
                name="128K",
                length=128 * K,
                rope_base=800_000.0,
                tokens=150 * B,
                batch_tokens=4 * M,
                learning_rate=LearningRate(peak=6e-5, warmup_steps=20, final=6e-6, decay_tokens=75 * B),
                mixture=Mixture(weights=shares),
                layout=Layout(context=8, expert=8),
            ),
        ),
    )
