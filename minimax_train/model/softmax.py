"""Softmax attention layer: grouped-query, causal inside each document, rotary on part of the head (arXiv 2501.08313 section 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimax_train.model.config import ModelConfig
from minimax_train.model.parts import Parts
from minimax_train.model.rope import rotate


def causal_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, boundaries: list[int]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal, document by document; G key-value heads serve H/G query heads each.

    `boundaries` are the document borders as host integers (cu_seqlens). Returns `[T, H, D]`.
    """
    outputs = []
    for start, stop in zip(boundaries, boundaries[1:], strict=False):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


class SoftmaxAttention(nn.Module):
    """One softmax mixer."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = parts.column(config.hidden_size, config.attention_size)
        self.k_proj = parts.column(config.hidden_size, config.key_value_size)
        self.v_proj = parts.column(config.hidden_size, config.key_value_size)
        self.o_proj = parts.row(config.attention_size, config.hidden_size)

    def forward(self, x_TC: Tensor, turn: tuple[Tensor, Tensor], boundaries: list[int]) -> Tensor:
        """`[T, hidden]` -> `[T, hidden]`; `turn` is rope.rotation at the tokens' positions."""
        tokens = x_TC.shape[0]
        q, k, v = (project(x_TC).view(tokens, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        o = causal_attention(rotate(q, *turn), rotate(k, *turn), v, boundaries)
        return self.o_proj(o.reshape(tokens, -1))
