"""Loss on held-out documents, over all ranks."""

from dataclasses import dataclass

import torch

from data.batches import Row, held_out_rows
from data.dataset import TokenDataset
from minimax_train.engine.session import Session
from minimax_train.model.decoder import Decoder
from minimax_train.train.rows import to_row
from parallel.collectives import all_sum


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the held-out documents said."""

    loss: float
    """Nats per predicted token."""
    tokens: int
    expert_share: list[list[float]]


def validation_rows(dataset: TokenDataset, length: int, tokens: int) -> list[Row]:
    """Held-out documents in rows of at most `length`, as many whole rows as hold at most `tokens` tokens; at least one."""
    rows: list[Row] = []
    taken = 0
    for row in held_out_rows(dataset, length):
        if rows and taken + len(row.tokens) > tokens:
            break
        rows.append(row)
        taken += len(row.tokens)
    return rows


@torch.no_grad()
def score(decoder: Decoder, rows: list[Row], session: Session) -> Score:
    """Each rank scores its share of the rows; the sums are exact whatever the number of ranks.

    All ranks run the same number of forward passes, for they may exchange rows with each other's experts: the last may not count.
    """
    decoder.eval()
    config = decoder.config
    counts = torch.zeros(config.num_layers, config.num_experts, dtype=torch.float64, device=session.device)
    sums = torch.zeros(2, dtype=torch.float64, device=session.device)
    data = session.groups.data
    for first in range(0, len(rows), data.size()):
        mine = first + data.rank()
        row = to_row(rows[min(mine, len(rows) - 1)], session)
        assert row.labels is not None
        losses, routings = decoder(row)
        if mine >= len(rows):
            continue
        sums += torch.stack([losses.double().sum(), (row.labels >= 0).double().sum()])
        counts += torch.stack([r.tokens_per_expert for r in routings])
    total = all_sum(torch.cat([sums, counts.flatten()]), session.groups.data_context).cpu()
    share = total[2:].view(counts.shape)
    return Score(loss=float(total[0] / total[1]), tokens=int(total[1]), expert_share=(share / share.sum(1, keepdim=True)).tolist())
