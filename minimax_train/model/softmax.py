"""Softmax attention layer: grouped-query, causal inside each document, rotary on part of the head (arXiv 2501.08313 section 2)."""

from collections.abc import Callable

from torch import Tensor, nn

from minimax_train.kernels.partial_attention import partial_attention
from minimax_train.kernels.softmax_attention import causal_attention
from minimax_train.model.config import ModelConfig
from minimax_train.model.parts import Parts
from minimax_train.model.rope import rotate
from minimax_train.model.row import Documents
from parallel.collectives import Pending
from parallel.ring import attention_over_pieces, begin_first_hop

Attend = Callable[[Tensor, Tensor, Tensor, Documents, Pending | None], Tensor]


class SoftmaxAttention(nn.Module):
    """One softmax mixer."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = parts.column(config.hidden_size, config.attention_size)
        self.k_proj = parts.column(config.hidden_size, config.key_value_size)
        self.v_proj = parts.column(config.hidden_size, config.key_value_size)
        self.o_proj = parts.row(config.attention_size, config.hidden_size)
        self.backend, self.groups = parts.backends.softmax, parts.groups
        self.attend = self._over_pieces(parts) if parts.groups.context.size > 1 else self._alone(config, parts)

    def forward(self, x_TC: Tensor, documents: Documents) -> Tensor:
        """`[T, hidden]` -> `[T, hidden]`. Keys and values of the ring's first hop travel while queries are made."""
        k, v = (project(x_TC).unflatten(1, (-1, self.head_dim)) for project in (self.k_proj, self.v_proj))
        k = rotate(k, *documents.turn)
        one_level = self.groups.key_value.size == 1
        first = begin_first_hop(k, v, documents.pieces, self.groups.ring) if one_level else None
        q = rotate(self.q_proj(x_TC).unflatten(1, (-1, self.head_dim)), *documents.turn)
        return self.o_proj(self.attend(q, k, v, documents, first).flatten(1))

    def _alone(self, config: ModelConfig, parts: Parts) -> Attend:
        """The whole row is here: the library's own function with its own backward."""
        function = causal_attention(
            self.backend,
            heads=len(parts.mine(config.num_attention_heads)),
            key_value_heads=len(parts.mine(config.num_key_value_heads)),
            head_size=config.head_dim,
            device=parts.device,
            dtype=parts.dtype,
        )
        return lambda q, k, v, documents, _: function(q, k, v, documents.local.cu_seqlens, documents.local.bounds)

    def _over_pieces(self, parts: Parts) -> Attend:
        """Context ranks hold pieces of the row."""
        part = partial_attention(self.backend, device=parts.device, dtype=parts.dtype, head_size=self.head_dim)
        key_value, ring = self.groups.key_value, self.groups.ring
        return lambda q, k, v, documents, first: attention_over_pieces(q, k, v, documents.pieces, key_value, ring, part, first)
