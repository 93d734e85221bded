"""Parameters and FLOPs of a model, by arithmetic: nothing is allocated.

FLOPs follow the accounting of the design's references: a matrix multiply is 2 FLOPs per weight and token, softmax attention
is causal (a token at the end of n sees n, one on average n/2), lightning attention counts its recurrence only (4 d^2 per head
and token), so that no choice of chunk or recomputation can inflate a utilisation figure. Training is 3 x forward.
"""

from dataclasses import asdict, dataclass

from minimax_train.model.config import ModelConfig


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


def matmul_weights(config: ModelConfig) -> int:
    """Weights that multiply one token in the forward pass: active parameters and head, norms and embedding lookup left out."""
    count = count_parameters(config)
    lightning_norms = config.layer_kinds.count("lightning") * config.attention_size
    return count.active - count.norms - lightning_norms + count.lm_head


def forward_flops(config: ModelConfig, *, tokens: int, squares: int) -> float:
    """FLOPs of one forward pass over `tokens` in documents whose squared lengths sum to `squares` (one document of n: n and n^2)."""
    lightning, softmax = (config.layer_kinds.count(kind) for kind in ("lightning", "softmax"))
    recurrence = lightning * 4 * config.head_dim * config.attention_size * tokens
    attention = softmax * 4 * config.attention_size * squares / 2  # q k^T and p v, 2 FLOPs each per channel and (query, key) pair
    return 2.0 * matmul_weights(config) * tokens + recurrence + attention


def training_flops(config: ModelConfig, *, tokens: int, squares: int) -> float:
    """FLOPs of forward and backward: three times the forward's; recomputation is not counted."""
    return 3.0 * forward_flops(config, tokens=tokens, squares=squares)
