"""Parameters and FLOPs of a model, by arithmetic: nothing is allocated.

FLOPs follow the accounting of the design's references: a matrix multiply is 2 FLOPs per weight and token, softmax attention
is causal (a token at the end of n sees n, one on average n/2), lightning attention counts its recurrence only (4 d^2 per head
and token), so that no choice of chunk or recomputation can inflate a utilisation figure. Training is 3 x forward.
"""

from dataclasses import asdict, dataclass

from minimax_train.model.config import LayerKind, ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by kind, whole model."""

    embedding: int
    lm_head: int
    lightning_attention: int
    softmax_attention: int
    experts: int
    routers: int
    norms: int
    active: int
    """Parameters one token meets, without embedding and head (45.945B for MiniMax-Text-01)."""

    @property
    def total(self) -> int:
        return self.embedding + self.lm_head + self.lightning_attention + self.softmax_attention + self.experts + self.routers + self.norms

    def as_dict(self) -> dict[str, int]:
        """`parameters` is the total; the kinds sum to it; `active` and `active_with_head` are what one token meets."""
        kinds = {name: value for name, value in asdict(self).items() if name != "active"}
        return {"parameters": self.total, "active": self.active, "active_with_head": self.active + self.lm_head, **kinds}


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Every weight of the model, by kind."""
    lightning, softmax = (config.layer_kinds.count(kind) for kind in ("lightning", "softmax"))
    hidden, width = config.hidden_size, config.attention_size
    expert = 3 * hidden * config.expert_ffn_size
    lightning_attention = lightning * (hidden * 5 * width + width)  # q, k, v, gate, out; the output norm
    softmax_attention = softmax * hidden * 2 * (width + config.key_value_size)
    routers = config.num_layers * hidden * config.num_experts
    norms = (2 * config.num_layers + 1) * hidden
    return ParameterCount(
        embedding=config.vocab_size * hidden,
        lm_head=config.vocab_size * hidden,
        lightning_attention=lightning_attention,
        softmax_attention=softmax_attention,
        experts=config.num_layers * config.num_experts * expert,
        routers=routers,
        norms=norms,
        active=lightning_attention + softmax_attention + config.num_layers * config.experts_per_token * expert + routers + norms,
    )


def layer_flops(config: ModelConfig, kind: LayerKind, *, tokens: int, squares: int) -> int:
    """FLOPs of one layer's forward pass; arguments as of forward_flops."""
    hidden, width = config.hidden_size, config.attention_size
    if kind == "lightning":
        projections, mixing = 5 * hidden * width, 4 * config.head_dim * width * tokens
    else:  # q k^T and p v, 2 FLOPs each per channel and (query, key) pair, of which causality leaves half
        projections, mixing = 2 * hidden * (width + config.key_value_size), 2 * width * squares
    experts = config.experts_per_token * 3 * hidden * config.expert_ffn_size + hidden * config.num_experts
    return 2 * (projections + experts) * tokens + mixing


def head_flops(config: ModelConfig, *, tokens: int) -> int:
    """FLOPs of the head's forward pass."""
    return 2 * config.vocab_size * config.hidden_size * tokens


def forward_flops(config: ModelConfig, *, tokens: int, squares: int) -> float:
    """FLOPs of one forward pass over `tokens` in documents whose squared lengths sum to `squares` (one document of n: n and n^2)."""
    layers = sum(layer_flops(config, kind, tokens=tokens, squares=squares) for kind in config.layer_kinds)
    return float(layers + head_flops(config, tokens=tokens))


def training_flops(config: ModelConfig, *, tokens: int, squares: int) -> float:
    """FLOPs of forward and backward: three times the forward's; recomputation is not counted."""
    return 3.0 * forward_flops(config, tokens=tokens, squares=squares)
