"""The whole model, or the layers of one pipeline stage: embedding, blocks, final norm, head.

Input is one packed row, or what a context rank holds of it.
"""

import torch
from torch import Tensor, nn

from minimax_train.model.block import Block
from minimax_train.model.config import ModelConfig
from minimax_train.model.norm import RMSNorm
from minimax_train.model.parts import Parts
from minimax_train.model.recompute import FirstRun, Recompute, recomputed
from minimax_train.model.rope import rotation
from minimax_train.model.router import Routing
from minimax_train.model.row import Documents, Row


class Decoder(nn.Module):
    """The layers of `layers` (None: all); the first stage owns the embedding, the last one norm and head."""

    def __init__(
        self, config: ModelConfig, parts: Parts, *, layers: range | None = None, fp32_head: bool = False, rope_base: float = 10_000.0
    ) -> None:
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        self.config, self.rope_base, self.backends = config, rope_base, parts.backends
        self.recompute: Recompute = "none"
        self.layers, self.is_first, self.is_last = layers, layers.start == 0, layers.stop == config.num_layers
        if self.is_first:
            self.embedding = parts.embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer, parts) for layer in layers})  # keyed by the global layer number
        if self.is_last:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, parts)
            self.head = parts.head(config.hidden_size, config.vocab_size, fp32=fp32_head)

    def documents(self, row: Row) -> Documents:
        """The row's borders and rotary angles, derived once for all layers."""
        return Documents.of(row, rotation(row.positions, self.config.rotary_dim, self.rope_base))

    def hidden(self, x_TC: Tensor, row: Row) -> tuple[Tensor, list[Routing]]:
        """Runs this stage's blocks over `[T, hidden]`."""
        documents, routings = self.documents(row), []
        for block in self.blocks.values():
            if self.recompute == "full" and torch.is_grad_enabled():
                x_TC, routing = recomputed(block, x_TC, documents, FirstRun())
            else:
                x_TC, routing = block(x_TC, documents, experts_again=self.recompute == "selective")
            routings.append(routing)
        return x_TC, routings

    def losses(self, x_TC: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every token, `[T]` fp32 nats, 0 where the label is -100; logits exist in chunks only."""
        losses: Tensor = self.head(self.norm(x_TC), labels)
        return losses

    def logits(self, row: Row) -> Tensor:
        """`[T, vocabulary]` for a short row; training uses `losses`."""
        x, _ = self.hidden(self.embedding(row.tokens), row)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def forward(self, row: Row) -> tuple[Tensor, list[Routing]]:
        """Losses `[T]` and each layer's routing, for a model in one stage."""
        if row.labels is None:
            raise ValueError("the row has no labels: give them, or ask for logits")
        x, routings = self.hidden(self.embedding(row.tokens), row)
        return self.losses(x, row.labels), routings
