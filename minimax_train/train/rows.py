"""data's rows (numpy) as the model's (torch)."""

import torch

from data.batches import Row as DataRow
from minimax_train.model.decoder import Row


def to_row(row: DataRow, device: torch.device) -> Row:
    """The same row on the model's device."""
    tokens, labels, positions, cu_seqlens = (torch.from_numpy(x) for x in (row.tokens, row.labels, row.positions, row.cu_seqlens))
    return Row(tokens=tokens, labels=labels, positions=positions, cu_seqlens=cu_seqlens).to(device)
