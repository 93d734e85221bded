"""data's rows (numpy) as the model's (torch)."""

import torch
import torch.nn.functional as F

from data.batches import Row as DataRow
from minimax_train.model.decoder import Row


def to_row(row: DataRow, device: torch.device, multiple: int = 1) -> Row:
    """The same row on the model's device, filled up to a multiple of `multiple` tokens by one more document, which has no labels."""
    tokens, labels, positions, cu_seqlens = (torch.from_numpy(x) for x in (row.tokens, row.labels, row.positions, row.cu_seqlens))
    missing = -len(tokens) % multiple
    if missing:
        tokens, labels = F.pad(tokens, (0, missing)), F.pad(labels, (0, missing), value=-100)
        positions, cu_seqlens = torch.cat([positions, torch.arange(missing)]), torch.cat([cu_seqlens, cu_seqlens[-1:] + missing])
    return Row(tokens=tokens, labels=labels, positions=positions, cu_seqlens=cu_seqlens).to(device)
