"""One packed row as a rank of the model gets it, and what all layers need to know of its documents."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from minimax_train.kernels.lightning_steps import LocalDocuments
from parallel.layout import Layout
from parallel.pieces import Pieces, cut_row
from parallel.states import Flow, state_flow


@dataclass(frozen=True, kw_only=True)
class Row:
    """One packed row: several documents end to end, of which this context rank holds T tokens, in the order of its pieces."""

    tokens: Tensor
    """`[T]` int64."""
    positions: Tensor
    """`[T]` int64, from 0 in every document."""
    pieces: Pieces
    """The documents of the whole row, the only truth about where one starts; and who holds what."""
    rank: int = 0
    """Among the context ranks."""
    labels: Tensor | None = None
    """`[T]` int64: the token that follows inside the document, or -100 where none does."""
    predicted: int = 0
    """Labels of the whole row that are not -100."""
    source: int = 0
    """Number of the source that gave it, of the plan's."""

    @classmethod
    def of_documents(cls, documents: list[Tensor]) -> "Row":
        """Packs whole documents (int64 `[n]` each, on the host) into one row on one rank, without labels."""
        bounds = [0, *accumulate(len(d) for d in documents)]
        positions = torch.cat([torch.arange(len(d)) for d in documents])
        return cls(tokens=torch.cat(documents), positions=positions, pieces=cut_row(bounds, 1))

    def with_labels(self, labels: Tensor) -> "Row":
        """The same whole row with labels `[T]`, on the host."""
        return replace(self, labels=labels, predicted=int((labels >= 0).sum()))

    def cut(self, layout: Layout, rank: int) -> "Row":
        """What context rank `rank` of the layout holds of this whole row. ValueError where the row does not divide."""
        pieces = cut_row(self.pieces.bounds, layout.context, layout.owners)
        tokens, positions = (pieces.cut(x, rank) for x in (self.tokens, self.positions))
        labels = None if self.labels is None else pieces.cut(self.labels, rank)
        return replace(self, tokens=tokens, positions=positions, labels=labels, pieces=pieces, rank=rank)

    def to(self, device: torch.device) -> "Row":
        """The same row on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, tokens=self.tokens.to(device), positions=self.positions.to(device), labels=labels)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The row's documents as its layers use them: derived once per row."""

    pieces: Pieces
    local: LocalDocuments
    """The documents of this rank's tokens."""
    flow: Flow
    """How lightning states pass between ranks, and (`back`) their gradients."""
    back: Flow
    turn: tuple[Tensor, Tensor]
    """Rotary (cos, sin) at each token's position in its document."""
    places: Tensor
    """`[T]` int64: where in the whole row each token stands."""

    @classmethod
    def of(cls, row: Row, turn: tuple[Tensor, Tensor]) -> "Documents":
        """Nothing is read back from the row's device."""
        local, device = row.pieces.local(row.rank), row.tokens.device
        cu_seqlens = torch.tensor(local.bounds, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        documents = LocalDocuments(cu_seqlens=cu_seqlens, bounds=list(local.bounds), enters=local.enters, leaves=local.leaves)
        flow = state_flow(row.pieces)
        places = torch.cat([torch.arange(run.start, run.stop, device=device) for run in row.pieces.runs(row.rank)])
        return cls(pieces=row.pieces, local=documents, flow=flow, back=flow.mirrored(), turn=turn, places=places)
