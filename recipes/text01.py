"""MiniMax-Text-01 at full size."""

from minimax_train.model.config import text01
from minimax_train.plan import Data, LearningRate, Plan, Stage


def shape() -> Plan:
    """The architecture at its first published length and batch: for `show` and `count`. The schedule's other parts follow later.

    Length 8,192, batch 16M tokens, peak 2e-4 after 500 steps: MiniMax-01 (arXiv 2501.08313) section 4. The stage's 69B tokens run
    to the first published doubling of the batch. The data prefixes stand for your own.
    """
    return Plan(
        name="text01-shape",
        model=text01(),
        data=Data(train="tokens/text01/train", validation="tokens/text01/validation"),
        stages=(
            Stage(
                name="8K",
                length=8192,
                rope_base=10_000.0,
                tokens=69_000_000_000,
                batch_tokens=16 * 2**20,
                learning_rate=LearningRate(peak=2e-4, warmup_steps=500),
            ),
        ),
    )
