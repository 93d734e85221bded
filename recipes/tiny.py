"""Laptop recipes: every number is ours unless a source stands beside it."""

from minimax_train.model.config import tiny
from minimax_train.plan import Checkpoints, Data, LearningRate, Plan, Stage, Validation


def stdlib() -> Plan:
    """Three stages, 2K -> 8K -> 32K with a rising RoPE base, on the source files of the Python that runs it; four rows in a batch, so that
    up to four data-parallel ranks have work.

    1.1M tokens of text in about 7 minutes on 2 cores (two ranks). The length grows x4 a stage, as in Kimi-VL's (arXiv 2504.07491
    section 2.3). The rate stays constant until the last stage, so that each stage still learns; it decays to the end of the run.
    """
    folder = "runs/data/stdlib"
    return Plan(
        name="tiny-stdlib",
        device="cpu",
        precision="fp32",
        model=tiny(),
        data=Data(train=f"{folder}/train", validation=f"{folder}/validation", prepare="stdlib"),
        stages=(
            Stage(
                name="2K",
                length=2048,
                rope_base=10_000.0,  # MiniMax-01 section 2, at its first length
                tokens=458_752,
                batch_tokens=8192,
                learning_rate=LearningRate(peak=3e-3, warmup_steps=12),
            ),
            Stage(
                name="8K",
                length=8192,
                rope_base=100_000.0,
                tokens=262_144,
                batch_tokens=32_768,
                learning_rate=LearningRate(peak=3e-3),
            ),
            Stage(
                name="32K",
                length=32_768,
                rope_base=1_000_000.0,
                tokens=393_216,
                batch_tokens=131_072,
                learning_rate=LearningRate(peak=3e-3, final=1.5e-4, decay_tokens=262_144),
            ),
        ),
        checkpoints=Checkpoints(every_steps=16),
        validation=Validation(every_steps=32),
    )
