"""The whole model, or the layers of one pipeline stage: embedding, blocks, final norm, head.

Input is one packed row: tokens of several documents end to end, `cu_seqlens` the only truth about where a document starts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minimax_train.model.block import Block, Documents
from minimax_train.model.config import ModelConfig
from minimax_train.model.experts import Routing
from minimax_train.model.norm import RMSNorm
from minimax_train.model.parts import Parts
from minimax_train.model.rope import rotation


@dataclass(frozen=True, kw_only=True)
class Row:
    """One packed row of T tokens, on the model's device."""

    tokens: Tensor
    """`[T]` int64."""
    positions: Tensor
    """`[T]` int64, from 0 in every document."""
    cu_seqlens: Tensor
    """`[documents + 1]` int32, from 0 to T."""
    labels: Tensor | None = None
    """`[T]` int64: the token that follows inside the document, or -100 where none does."""

    @classmethod
    def of_documents(cls, documents: list[Tensor]) -> "Row":
        """Packs whole documents (int64 `[n]` each, on the host) into one row, without labels."""
        lengths = torch.tensor([0] + [len(d) for d in documents])
        positions = torch.cat([torch.arange(len(d)) for d in documents])
        return cls(tokens=torch.cat(documents), positions=positions, cu_seqlens=lengths.cumsum(0).to(torch.int32))

    def to(self, device: torch.device) -> "Row":
        """The same row on another device."""
        return Row(
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )


class Decoder(nn.Module):
    """Layers `first_layer` up to `last_layer` (exclusive); the first stage owns the embedding, the last one norm and head."""

    def __init__(
        self, config: ModelConfig, parts: Parts, *, layers: range | None = None, fp32_head: bool = False, rope_base: float = 10_000.0
    ) -> None:
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        self.config, self.rope_base, self.backends = config, rope_base, parts.backends
        if layers.start == 0:
            self.embedding = parts.embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer, parts) for layer in layers})  # keyed by the global layer number
        if layers.stop == config.num_layers:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, parts)
            self.head = parts.head(config.hidden_size, config.vocab_size, fp32=fp32_head)

    def documents(self, row: Row) -> Documents:
        """The row's borders and rotary angles, derived once for all layers."""
        turn = rotation(row.positions, self.config.rotary_dim, self.rope_base)
        return Documents(cu_seqlens=row.cu_seqlens, boundaries=row.cu_seqlens.tolist(), turn=turn)

    def hidden(self, x_TC: Tensor, row: Row) -> tuple[Tensor, list[Routing]]:
        """Runs this stage's blocks over `[T, hidden]`."""
        documents, routings = self.documents(row), []
        for block in self.blocks.values():
            x_TC, routing = block(x_TC, documents)
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
