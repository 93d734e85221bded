"""Laptop recipes: every number is ours unless a source stands beside it."""

from minimax_train.model.config import ModelConfig, deepnorm_alpha, tiny
from minimax_train.plan import Checkpoints, Data, LearningRate, Mixture, Plan, Source, Stage, Validation


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


def retrieval() -> Plan:
    """Four stages, 256 -> 512 -> 1,024 -> 2,048 with a rising RoPE base, on documents that ask for what stands in them: the context grows
    before one's eyes, in some three minutes on 2 cores (two ranks).

    The token files, a source for each length of document, are `data.retrieval.write_lengths`'s. Every stage after the first mixes its own
    length with the shorter ones, as MiniMax-01's do (arXiv 2501.08313, Table 6); the shares are ours, and so is every other number. One
    lightning and one softmax layer, not 7 and 1: the fewest that find a key by what stands before its value, for minutes matter here.
    """
    folder, lengths = "runs/data/retrieval", (256, 512, 1024, 2048)
    alpha = deepnorm_alpha(2)
    return Plan(
        name="tiny-retrieval",
        device="cpu",
        precision="fp32",
        model=ModelConfig(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            rotary_dim=32,
            num_experts=2,
            experts_per_token=2,
            expert_ffn_size=64,
            vocab_size=80,  # data.retrieval.write_lengths' words
            pattern=("lightning", "softmax"),
            alpha_lightning=alpha,
            alpha_softmax=alpha,
            alpha_experts=alpha,
        ),
        data=Data(
            sources={str(length): Source(prefix=f"{folder}/{length}") for length in lengths},
            validation=f"{folder}/validation",
        ),
        stages=(
            Stage(
                name="256",
                length=256,
                rope_base=10_000.0,  # MiniMax-01 section 2, at its first length
                tokens=2_048_000,
                batch_tokens=2048,
                learning_rate=LearningRate(peak=3e-3, warmup_steps=20, final=3e-4, decay_tokens=204_800),
                mixture=Mixture(weights={"256": 1.0}),
            ),
            _longer(512, rope_base=30_000.0, weights={"256": 0.5, "512": 0.5}),
            _longer(1024, rope_base=100_000.0, weights={"256": 0.25, "512": 0.25, "1024": 0.5}),
            _longer(2048, rope_base=300_000.0, weights={"256": 0.2, "512": 0.15, "1024": 0.15, "2048": 0.5}, tokens=327_680, final=1e-4),
        ),
        checkpoints=Checkpoints(every_steps=1000),
        validation=Validation(every_steps=100, tokens=8192),
    )


def _longer(length: int, *, rope_base: float, weights: dict[str, float], tokens: int = 163_840, final: float = 1e-3) -> Stage:
    """A stage of retrieval's extension: the rate rises anew, for the moments belong to the shorter rows."""
    return Stage(
        name=str(length),
        length=length,
        rope_base=rope_base,
        tokens=tokens,
        batch_tokens=4096,
        learning_rate=LearningRate(peak=1e-3, warmup_steps=5, final=final, decay_tokens=tokens // 2),
        mixture=Mixture(weights=weights),
        packing="best_fit",
    )
