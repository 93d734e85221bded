"""MiniMax-M1's way on from MiniMax-Text-01 (arXiv 2506.13585, section 2): more pretraining, then context in four smoother stages.

Published: 7.5T tokens, their rates, that the decay took 5T, that there were four stages from 32K to 1M because larger jumps made
gradients explode. Not published, and ours: the decay's shape, length and batch, the two middle lengths, and of the stages all tokens,
bases, mixtures, rates and layouts.
"""

from dataclasses import replace

from minimax_train.model.config import text01
from minimax_train.plan import Data, LearningRate, Plan, Stage, Start
from parallel.layout import Layout
from recipes.text01 import AT_8K, B, K, M, by_length, mixture

CORPUS, VALIDATION = "tokens/m1/corpus", "tokens/m1/validation"
BASE = 1e7  # the released models' (config.json)


def continue_pretrain() -> Plan:
    """8e-5 for 2.5T tokens, then down to 8e-6 over 5T."""
    return Plan(
        name="m1-continue-pretrain",
        model=text01(),
        data=Data(train=CORPUS, validation=VALIDATION),
        start=Start(checkpoint="checkpoints/text01"),
        layout=AT_8K,
        stages=(
            Stage(
                name="8K",
                length=8 * K,
                rope_base=BASE,
                tokens=7_500 * B,
                batch_tokens=128 * M,
                learning_rate=LearningRate(peak=8e-5, warmup_steps=200, final=8e-6, decay_tokens=5_000 * B),
            ),
        ),
    )


def extend() -> Plan:
    """32K, 128K, 512K, 1M: four times longer each but the last."""
    first = Stage(
        name="32K",
        length=32 * K,
        rope_base=BASE,
        tokens=40 * B,
        batch_tokens=64 * M,
        learning_rate=LearningRate(peak=8e-6, warmup_steps=50),
        mixture=mixture(60, 40, 0),
        layout=Layout(tensor=8, pipeline=10, context=4, expert=32),  # as many tokens a rank as at 8K; with context 1 it needs 125 GiB
    )
    second = replace(
        first,
        name="128K",
        length=128 * K,
        mixture=mixture(30, 70, 0, ramp_tokens=4 * B),
        layout=Layout(tensor=8, pipeline=10, context=8, expert=32),  # with context 4 it does not fit: 97 GiB
        recompute="selective",
    )
    third = replace(
        second,
        name="512K",
        length=512 * K,
        mixture=mixture(35, 35, 30, ramp_tokens=4 * B),
        layout=Layout(tensor=8, pipeline=10, context=8, expert=32),
        recompute="full",
    )
    last = replace(
        third,
        name="1M",
        length=1024 * K,
        mixture=mixture(30, 30, 40, ramp_tokens=4 * B),
        layout=Layout(tensor=8, pipeline=10, context=8, expert=32),
    )
    return Plan(
        name="m1-extend",
        model=text01(),
        data=by_length(CORPUS, VALIDATION),
        start=Start(checkpoint="runs/m1-continue-pretrain"),
        stages=(first, second, third, last),
    )
