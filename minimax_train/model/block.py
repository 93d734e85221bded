"""One layer: mixer and experts, DeepNorm post-norm with the residual taken after the norm (released modeling_minimax_m1.py).

h = RMS(x);  x = alpha * h + beta * Mixer(h)
h = RMS(x);  x = alpha * h + beta * Experts(h)
"""

from torch import Tensor, nn

from minimax_train.model.config import ModelConfig
from minimax_train.model.experts import Experts, Routing
from minimax_train.model.lightning import LightningAttention
from minimax_train.model.norm import RMSNorm
from minimax_train.model.parts import Parts
from minimax_train.model.recompute import FirstRun
from minimax_train.model.row import Documents
from minimax_train.model.softmax import SoftmaxAttention


class Block(nn.Module):
    """Layer `layer` (0-based, counted over the whole model) of its configured kind."""

    def __init__(self, config: ModelConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        kind = config.layer_kinds[layer]
        self.attention = LightningAttention(config, layer, parts) if kind == "lightning" else SoftmaxAttention(config, parts)
        self.alpha = config.alpha_lightning if kind == "lightning" else config.alpha_softmax
        self.beta = config.beta_lightning if kind == "lightning" else config.beta_softmax
        self.alpha_experts, self.beta_experts = config.alpha_experts, config.beta_experts
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, parts)
        self.experts_norm = RMSNorm(config.hidden_size, config.norm_eps, parts)
        self.experts = Experts(config, parts)

    def forward(
        self, x_TC: Tensor, documents: Documents, first: FirstRun | None = None, *, experts_again: bool = False
    ) -> tuple[Tensor, Routing]:
        """`[T, hidden]` -> `[T, hidden]`. `first`: see recompute.recomputed. `experts_again`: the backward pass computes the experts' gate
        and up again."""
        h = self.attention_norm(x_TC)
        return self.after_mixer(h, self.attention(h, documents), documents.places, first, experts_again=experts_again)

    def after_mixer(
        self, h_TC: Tensor, mixed_TC: Tensor, places_S: Tensor | None = None, first: FirstRun | None = None, *, experts_again: bool = False
    ) -> tuple[Tensor, Routing]:
        """The rest of the layer, given the normed input and what a mixer made of it."""
        h = self.experts_norm(self.alpha * h_TC + self.beta * mixed_TC)
        y, routing = self.experts(h, places_S, first, again=experts_again)
        return self.alpha_experts * h + self.beta_experts * y, routing
