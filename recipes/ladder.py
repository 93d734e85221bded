"""Models for real budgets, of MiniMax-Text-01's kind: every number is ours unless a source stands beside it.

The shapes keep Text-01's pattern, head size and half-rotated heads, two experts a token, and DeepNorm's gain for their depth. Each recipe
goes the whole way from drawn weights to long context; `start.checkpoint` begins it from a model you have.
"""

from minimax_train.model.config import ModelConfig, deepnorm_alpha
from minimax_train.plan import LearningRate, Plan, Stage
from parallel.layout import Layout
from recipes.text01 import B, K, M, by_length, mixture

VOCABULARY = 65_536


def _model(num_layers: int, hidden_size: int, heads: int, experts: int, ffn: int) -> ModelConfig:
    alpha = deepnorm_alpha(num_layers)
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        rotary_dim=64,
        num_experts=experts,
        experts_per_token=2,
        expert_ffn_size=ffn,
        vocab_size=VOCABULARY,
        alpha_lightning=alpha,
        alpha_softmax=alpha,
        alpha_experts=alpha,
    )


def hybrid_1b() -> Plan:
    """0.86B parameters, 0.27B active, on one node of 8 GPUs: 8K, 32K, 128K."""
    rate = LearningRate(peak=3e-4, warmup_steps=500)
    return Plan(
        name="hybrid-1b",
        model=_model(24, 1024, 8, 8, 1024),
        data=by_length("tokens/ladder/corpus", "tokens/ladder/validation"),
        stages=(
            _stage("8K", 8 * K, 1e4, 20 * B, 1 * M, rate, (100, 0, 0), Layout(), late=False),
            _stage("32K", 32 * K, 2e5, 2 * B, 1 * M, LearningRate(peak=1e-4, warmup_steps=20), (75, 25, 0), Layout(context=2)),
            _stage("128K", 128 * K, 5e6, 2 * B, 2 * M, _last(1e-4, 1 * B), (40, 40, 20), Layout(context=8)),
        ),
    )


def hybrid_7b() -> Plan:
    """7.35B parameters, 1.44B active, on 8 nodes of 8 GPUs: 8K, 32K, 128K, 512K, 1M, no step longer than four times."""
    rate = LearningRate(peak=2e-4, warmup_steps=500)
    extension = LearningRate(peak=6e-5, warmup_steps=20)
    return Plan(
        name="hybrid-7b",
        model=_model(32, 2048, 16, 16, 2048),
        data=by_length("tokens/ladder/corpus", "tokens/ladder/validation"),
        stages=(
            _stage("8K", 8 * K, 1e4, 100 * B, 4 * M, rate, (100, 0, 0), Layout(expert=8), late=False),
            _stage("32K", 32 * K, 2e5, 10 * B, 4 * M, extension, (75, 25, 0), Layout(context=2, expert=8)),
            _stage("128K", 128 * K, 5e6, 10 * B, 4 * M, extension, (30, 70, 0), Layout(context=8, expert=8)),
            _stage("512K", 512 * K, 1e7, 4 * B, 4 * M, extension, (35, 35, 30), Layout(context=32, expert=8)),
            _stage("1M", 1024 * K, 1e7, 4 * B, 4 * M, _last(6e-5, 2 * B), (30, 30, 40), Layout(tensor=2, context=32, expert=8)),
        ),
    )


def _last(peak: float, decay_tokens: int) -> LearningRate:
    return LearningRate(peak=peak, warmup_steps=20, final=peak / 10, decay_tokens=decay_tokens)


def _stage(
    name: str,
    length: int,
    base: float,
    tokens: int,
    batch: int,
    rate: LearningRate,
    shares: tuple[int, int, int],
    layout: Layout,
    *,
    late: bool = True,
) -> Stage:
    """`shares`: of short, medium and long documents; `late`: an extension stage, with a ramp over its first tenth."""
    mixed = mixture(*shares, ramp_tokens=tokens // 10 if late else 0)
    return Stage(
        name=name,
        length=length,
        rope_base=base,
        tokens=tokens,
        batch_tokens=batch,
        learning_rate=rate,
        mixture=mixed,
        layout=layout,
        recompute="full" if length > 128 * K else "none",
    )
