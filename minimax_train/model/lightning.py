"""Lightning attention layer (MiniMax-01, arXiv 2501.08313 section 2; released modeling_minimax_m1.py).

[q|k|v] = SiLU(W_qkv x)   head-major: for each head its q, then its k, then its v
S_t = exp(-s) S_{t-1} + k_t^T v_t,   o_t = q_t S_t      (no scale, no rotary)
y = W_o( sigmoid(W_g x) * RMSNorm(o) )                  (one norm over all heads x head_dim channels)
"""

import torch
from torch import Tensor, nn

from minimax_train.kernels.lightning_steps import lightning_steps
from minimax_train.model.config import ModelConfig
from minimax_train.model.norm import GatedRMSNorm
from minimax_train.model.parts import Parts
from minimax_train.model.row import Documents
from parallel.exchange import Exchange, make_exchange
from parallel.lightning import Passing, lightning_over_pieces


def decay_slopes(heads: int, layer: int, layers: int) -> Tensor:
    """Slopes s `[heads]`, fp32: per token the state decays by exp(-s). `layer` is the 0-based index among all `layers`.

    s = 2^(-8h/H) * (1 - layer/(layers-1) + 1e-5), h = 1..H, with ALiBi's rule for H that is no power of two (released code).
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-4 * (2 * j - 1) / power) for j in range(1, heads - power + 1)]
    factor = 1 - layer / max(layers - 1, 1) + 1e-5
    return torch.tensor([s * factor for s in slopes], dtype=torch.float32)


class LightningAttention(nn.Module):
    """One lightning mixer. Slopes are a plain attribute, never a buffer: casts to bf16 must not reach them."""

    def __init__(self, config: ModelConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        width = config.attention_size
        self.head_dim = config.head_dim
        self.qkv_proj = parts.column(config.hidden_size, 3 * width)
        self.output_gate = parts.column(config.hidden_size, width)
        self.norm = GatedRMSNorm(width, config.lightning_norm_eps, parts)
        self.out_proj = parts.row(width, config.hidden_size)
        self.backend, self.context, self.layout = parts.backends.lightning, parts.groups.context, parts.groups.layout
        self.exchanges: dict[int, Exchange] = {}  # by length of a piece: what is slow does not change from row to row
        heads = parts.mine(config.num_attention_heads)
        slopes = decay_slopes(config.num_attention_heads, layer, config.num_layers)[heads.start : heads.stop]
        self.slopes, self.host_slopes = slopes.to(parts.device), slopes.tolist()

    def forward(self, x_TC: Tensor, documents: Documents) -> Tensor:
        """`[T, hidden]` -> `[T, hidden]`; the state starts from zero at every document. The gate is projected while states travel."""
        qkv = self.qkv_proj(x_TC).unflatten(1, (-1, 3, self.head_dim))
        steps = lightning_steps(self.slopes, documents.local, backend=self.backend, dtype=qkv.dtype, head_size=self.head_dim)
        o, gate = lightning_over_pieces(qkv, steps, self.passing(documents, qkv.dtype), lambda: self.output_gate(x_TC))
        return self.out_proj(self.norm(o.flatten(1), gate))

    def passing(self, documents: Documents, dtype: torch.dtype) -> Passing:
        """How this layer's states pass between the context ranks; states are fp32, or fp64 for fp64."""
        length, states = documents.pieces.length, torch.promote_types(dtype, torch.float32)
        if length not in self.exchanges:
            kind, cut = self.layout.exchange, self.layout.decay_cut
            self.exchanges[length] = make_exchange(kind, self.slopes, self.host_slopes, length, self.context.size, states, cut=cut)
        return Passing(exchange=self.exchanges[length], flow=documents.flow, back=documents.back, channel=self.context)
