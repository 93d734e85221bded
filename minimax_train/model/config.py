"""The architecture of a MiniMax hybrid model, as data.

Source of every default: MiniMax-01 (arXiv 2501.08313) section 2 and the released `config.json` of MiniMax-M1.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

LayerKind = Literal["lightning", "softmax"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of the model; two models are the same architecture iff these records are equal.

    `pattern` repeats over the layers: MiniMax-Text-01's is 7 x lightning, 1 x softmax. `alpha_*` multiply the residual
    (which is the *normed* input: DeepNorm post-norm), `beta_*` the sublayer's output. Attention width,
    num_attention_heads * head_dim, is independent of hidden_size. `rotary_dim` of head_dim channels are rotated,
    in softmax layers only. Raises ValueError, naming both numbers, where sizes do not divide.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    vocab_size: int
    pattern: tuple[LayerKind, ...] = ("lightning",) * 7 + ("softmax",)
    alpha_lightning: float
    alpha_softmax: float
    alpha_experts: float
    beta_lightning: float = 1.0
    beta_softmax: float = 1.0
    beta_experts: float = 1.0
    norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6  # the output norm inside lightning attention keeps its class default in the release

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"model.{field.name} is {value}; it must be at least 1")
        if not self.pattern or self.num_layers % len(self.pattern):
            raise ValueError(
                f"model.num_layers is {self.num_layers}, which the pattern of {len(self.pattern)} layers does not divide: "
                "change num_layers or model.pattern"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads is {self.num_attention_heads}, not a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"model.rotary_dim is {self.rotary_dim}; it must be even and at most head_dim {self.head_dim}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"model.experts_per_token is {self.experts_per_token}, more than num_experts {self.num_experts}")

    def check_tensor(self, ranks: int) -> None:
        """ValueError where `ranks` tensor-parallel ranks cannot have equal parts of the heads and of the vocabulary."""
        sizes = {name: getattr(self, name) for name in ("num_attention_heads", "num_key_value_heads", "vocab_size")}
        for name, size in sizes.items():
            if size % ranks:
                raise ValueError(
                    f"layout.tensor is {ranks}, which does not divide model.{name} {size}: use a divisor of {math.gcd(*sizes.values())}"
                )

    def check_experts(self, expert: int, expert_tensor: int) -> None:
        """ValueError where `expert` ranks cannot have as many experts each, or `expert_tensor` ranks equal slices of one."""
        for degree, ranks, name in (("expert", expert, "num_experts"), ("expert_tensor", expert_tensor, "expert_ffn_size")):
            size = getattr(self, name)
            if size % ranks:
                raise ValueError(f"layout.{degree} is {ranks}, which does not divide model.{name} {size}: use a divisor of {size}")

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        return self.pattern * (self.num_layers // len(self.pattern))

    @property
    def attention_size(self) -> int:
        """Width of both mixers: heads x head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of the softmax layers' keys (and values): key-value heads x head_dim."""
        return self.num_key_value_heads * self.head_dim


def deepnorm_alpha(num_layers: int) -> float:
    """DeepNorm's residual gain for a decoder of `num_layers` layers, (2L)^(1/4) (arXiv 2203.00555, table 1)."""
    return float((2 * num_layers) ** 0.25)


def deepnorm_beta(num_layers: int) -> float:
    """DeepNorm's initialisation gain, (8L)^(-1/4): it scales initial weights, not the forward pass (arXiv 2203.00555)."""
    return float((8 * num_layers) ** -0.25)


def shortest_pattern(kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """The shortest tuple whose repetition gives `kinds`."""
    length = next(n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds[:n] * (len(kinds) // n) == kinds)
    return kinds[:length]


def text01() -> ModelConfig:
    """MiniMax-Text-01 and MiniMax-M1: 456,089,655,296 parameters."""
    alpha = deepnorm_alpha(80)  # 3.5565588200778455, as in the released config.json
    return ModelConfig(
        num_layers=80,
        hidden_size=6144,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        rotary_dim=64,
        num_experts=32,
        experts_per_token=2,
        expert_ffn_size=9216,
        vocab_size=200_064,
        alpha_lightning=alpha,
        alpha_softmax=alpha,
        alpha_experts=alpha,
    )


def tiny(vocab_size: int = 1024) -> ModelConfig:
    """Ours: the same shape at laptop size. Full rotary and a power-of-two head count, so that stock transformers runs its export; a
    key-value head for each of 4 tensor-parallel ranks."""
    alpha = deepnorm_alpha(8)
    return ModelConfig(
        num_layers=8,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        rotary_dim=64,
        num_experts=8,
        experts_per_token=2,
        expert_ffn_size=128,
        vocab_size=vocab_size,
        alpha_lightning=alpha,
        alpha_softmax=alpha,
        alpha_experts=alpha,
    )
