"""Softmax attention layer: grouped-query, causal inside each document, rotary on part of the head (arXiv 2501.08313 section 2)."""

from torch import Tensor, nn

from minimax_train.kernels.softmax_attention import causal_attention
from minimax_train.model.config import ModelConfig
from minimax_train.model.parts import Parts
from minimax_train.model.rope import rotate


class SoftmaxAttention(nn.Module):
    """One softmax mixer."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = parts.column(config.hidden_size, config.attention_size)
        self.k_proj = parts.column(config.hidden_size, config.key_value_size)
        self.v_proj = parts.column(config.hidden_size, config.key_value_size)
        self.o_proj = parts.row(config.attention_size, config.hidden_size)
        self.backend = parts.backends.softmax
        self.attend = causal_attention(
            self.backend,
            heads=len(parts.mine(config.num_attention_heads)),
            key_value_heads=len(parts.mine(config.num_key_value_heads)),
            head_size=config.head_dim,
            device=parts.device,
            dtype=parts.dtype,
        )

    def forward(self, x_TC: Tensor, turn: tuple[Tensor, Tensor], cu_seqlens: Tensor, bounds: list[int]) -> Tensor:
        """`[T, hidden]` -> `[T, hidden]`; `turn` is rope.rotation at the tokens' positions, `bounds` is cu_seqlens on the host."""
        q, k, v = (project(x_TC).unflatten(1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        o = self.attend(rotate(q, *turn), rotate(k, *turn), v, cu_seqlens, bounds)
        return self.o_proj(o.flatten(1))
