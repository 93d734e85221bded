"""MiniMax-Text-01 at full size: how it was pretrained and how its context was extended (arXiv 2501.08313, section 4 and Table 6).

Published: lengths, RoPE bases, tokens, batches and rates of pretraining, mixtures by document length. Not published, and ours: batch and
rate of the extension stages, how long the mixture takes to change, all layouts, that 128K is 131,072. The prefixes stand for your own
files.
"""

from minimax_train.model.config import text01
from minimax_train.plan import Batch, CriticalBatch, Data, LearningRate, Mixture, Plan, Plateau, Source, Stage, Start
from parallel.layout import Layout

K, M, B, T = 2**10, 2**20, 10**9, 10**12  # lengths and batches in powers of two (ours), corpora in powers of ten
CORPUS, VALIDATION = "tokens/text01/corpus", "tokens/text01/validation"
AT_8K = Layout(tensor=8, pipeline=10, expert=32)
"""Ours, for 640 H800s or a multiple. Ten pipeline stages have a softmax layer each, which at 1M tokens costs as much as what is left of its
stage twice over; an expert group of 32 ranks is four nodes; the experts are not cut. That each stage below fits into 80 GB is `plan`'s
arithmetic: the first pipeline rank, with ten rows in flight, needs 46 GiB at 8K."""


def shape() -> Plan:
    """The architecture at its first published length and batch: for `show` and `count`."""
    return Plan(
        name="text01-shape",
        model=text01(),
        data=Data(train=CORPUS, validation=VALIDATION),
        stages=(
            Stage(
                name="8K",
                length=8 * K,
                rope_base=10_000.0,
                tokens=69 * B,
                batch_tokens=16 * M,
                learning_rate=LearningRate(peak=2e-4, warmup_steps=500),
            ),
        ),
    )


def pretrain() -> Plan:
    """11.4T tokens at 8K: the batch doubles three times, the rate is 2e-4, then 1.3e-4 (section 4)."""
    return Plan(
        name="text01-pretrain",
        model=text01(),
        data=Data(train=CORPUS, validation=VALIDATION),
        layout=AT_8K,
        critical_batch=CriticalBatch(tokens_at_one=2.1e9, power=6.12),  # our fit to the four doublings of figure 13
        stages=(
            Stage(
                name="8K",
                length=8 * K,
                rope_base=10_000.0,
                tokens=11_400 * B,
                batch_tokens=16 * M,
                batch_ramp=(
                    Batch(from_tokens=69 * B, batch_tokens=32 * M),
                    Batch(from_tokens=790 * B, batch_tokens=64 * M),
                    Batch(from_tokens=4_700 * B, batch_tokens=128 * M),
                ),
                learning_rate=LearningRate(
                    peak=2e-4,
                    warmup_steps=500,
                    plateaus=(Plateau(from_tokens=7_200 * B, rate=1.3e-4),),  # lowered because of anomalous gradient norms
                    final=3e-5,
                    decay_tokens=T,
                    decay="exponential",
                ),
            ),
        ),
    )


def extend() -> Plan:
    """The three stages to 1M in one run, from pretrained weights: `train --stage 128K` gives one of them nodes of its own."""
    return _extension("text01-extend", "checkpoints/text01-8K", (_at_128k(), _at_512k(), _at_1m()))


def extend_128k() -> Plan:
    """The first stage alone."""
    return _extension("text01-extend-128K", "checkpoints/text01-8K", (_at_128k(),))


def extend_512k() -> Plan:
    """The second stage alone: from the first one's run, so without a ramp of the mixture."""
    return _extension("text01-extend-512K", "runs/text01-extend-128K", (_at_512k(ramp=False),))


def extend_1m() -> Plan:
    """The third stage alone: from the second one's run, so without a ramp of the mixture."""
    return _extension("text01-extend-1M", "runs/text01-extend-512K", (_at_1m(ramp=False),))


def _extension(name: str, checkpoint: str, stages: tuple[Stage, ...]) -> Plan:
    return Plan(name=name, model=text01(), data=by_length(CORPUS, VALIDATION), start=Start(checkpoint=checkpoint), stages=stages)


def by_length(corpus: str, validation: str) -> Data:
    """The corpus in Table 6's parts, short < 32K, medium 32K to 128K, long > 128K tokens, and long-context question answering."""
    return Data(
        validation=validation,
        sources={
            "short": Source(prefix=corpus, below=32 * K),
            "medium": Source(prefix=corpus, at_least=32 * K, below=128 * K),
            "long": Source(prefix=corpus, at_least=128 * K),
            "long_qa": Source(prefix=f"{corpus}-long-qa"),
        },
    )


def mixture(short: int, medium: int, long: int, *, ramp_tokens: int = 0) -> Mixture:
    """Table 6's percentages; 10 % of question answering in a stage's last 20 % (section 4)."""
    return Mixture(
        weights={"short": short, "medium": medium, "long": long}, ramp_tokens=ramp_tokens, late={"long_qa": 0.1}, late_fraction=0.2
    )


def _at_128k() -> Stage:
    return Stage(
        name="128K",
        length=128 * K,
        rope_base=5e6,
        tokens=300 * B,
        batch_tokens=128 * M,
        learning_rate=LearningRate(peak=3e-5, warmup_steps=20),  # ours: where pretraining ended
        mixture=mixture(30, 70, 0),
        layout=Layout(tensor=8, pipeline=10, context=8, expert=32),  # with context 4 it does not fit: 98 GiB
        recompute="selective",
    )


def _at_512k(*, ramp: bool = True) -> Stage:
    return Stage(
        name="512K",
        length=512 * K,
        rope_base=1e7,
        tokens=32 * B,
        batch_tokens=128 * M,
        learning_rate=LearningRate(peak=3e-5, warmup_steps=20),
        mixture=mixture(35, 35, 30, ramp_tokens=3 * B if ramp else 0),
        layout=Layout(tensor=8, pipeline=10, context=8, expert=32),
        recompute="full",
    )


def _at_1m(*, ramp: bool = True) -> Stage:
    return Stage(
        name="1M",
        length=1024 * K,
        rope_base=1e7,
        tokens=26 * B,
        batch_tokens=128 * M,
        learning_rate=LearningRate(peak=3e-5, warmup_steps=20, final=3e-6, decay_tokens=13 * B),  # ours
        mixture=mixture(30, 30, 40, ramp_tokens=3 * B if ramp else 0),
        layout=Layout(tensor=8, pipeline=10, context=8, expert=32),
        recompute="full",
    )
