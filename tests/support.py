"""Small real things that several tests need: a little model, a little corpus, a plan that trains in a second."""

import random
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.batches import Row
from data.dataset import TokenDataset
from data.mixture import Shares
from data.prepare import prepare
from data.sampler import Batching, Bookmark, Sampler
from data.tokenizer import train_tokenizer
from data.views import of_length
from minimax_train.model.config import ModelConfig, deepnorm_alpha
from minimax_train.plan import Checkpoints, Data, LearningRate, Plan, Stage, Validation

FIXTURE = Path(__file__).parent / "fixtures" / "minimax_m1_tiny"


def little_model(**changes: Any) -> ModelConfig:
    """4 layers (3 lightning, 1 softmax), 4 heads of 16 on hidden 32, 4 experts; full rotary, so that transformers runs it too."""
    alpha = deepnorm_alpha(4)
    fields: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 16,
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_ffn_size": 24,
        "vocab_size": 300,
        "pattern": ("lightning", "lightning", "lightning", "softmax"),
        "alpha_lightning": alpha,
        "alpha_softmax": alpha,
        "alpha_experts": alpha,
    }
    return ModelConfig(**{**fields, **changes})


def little_corpus(folder: Path) -> Path:
    """folder/{train,validation}.{bin,idx,json} of made-up English-like documents of 20 to 3,000 words, vocabulary 300."""
    draw = random.Random(7)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 6))) for _ in range(80)]
    texts = [" ".join(draw.choices(words, k=draw.choice([20, 60, 200, 3000]))) for _ in range(60)]
    tokenizer = train_tokenizer(texts[10:], vocabulary=300)
    for name, part in (("validation", texts[:10]), ("train", texts[10:])):
        source = folder / f"{name}-text"
        source.mkdir(parents=True)
        for number, text in enumerate(part):
            (source / f"{number:03}.txt").write_text(text)
        prepare([source], tokenizer, folder / name, quiet=True)
    return folder


def little_plan(corpus: Path, **changes: Any) -> Plan:
    """Two stages, 64 -> 256 tokens, 6 + 3 steps."""
    fields: dict[str, Any] = {
        "name": "little",
        "model": little_model(),
        "data": Data(train=str(corpus / "train"), validation=str(corpus / "validation")),
        "device": "cpu",
        "precision": "fp32",
        "stages": (
            Stage(
                name="64",
                length=64,
                rope_base=1e4,
                tokens=6 * 256,
                batch_tokens=256,
                learning_rate=LearningRate(peak=3e-3, warmup_steps=2),
            ),
            Stage(
                name="256",
                length=256,
                rope_base=1e5,
                tokens=3 * 512,
                batch_tokens=512,
                learning_rate=LearningRate(peak=2e-3, final=1e-4, decay_tokens=512, decay="cosine"),
            ),
        ),
        "checkpoints": Checkpoints(every_steps=2, keep=3),
        "validation": Validation(every_steps=4, tokens=600),
    }
    return Plan(**{**fields, **changes})


class LittleRows:
    """Rows of one source, by number: those a stage of that length trains on."""

    def __init__(self, prefix: str | None, *, seed: int = 1, length: int = 64) -> None:
        one = [Fraction(1)]
        self._made: list[Row] = []
        self._rows = Sampler(
            {"train": of_length(TokenDataset.open(str(prefix)))},
            Shares(one, one, one, ramp=Fraction(0), late_from=0),
            Batching(length=length, packing="concat", window_tokens=2**20),
            seed=seed,
            bookmarks={"train": Bookmark()},
        )

    def row(self, sample: int) -> Row:
        while len(self._made) <= sample:
            self._made.append(next(self._rows).row)
        return self._made[sample]
