"""data's rows (numpy) as the model's (torch)."""

import math

import torch
import torch.nn.functional as F

from data.batches import NOTHING_TO_PREDICT
from data.batches import Row as DataRow
from minimax_train.engine.session import Session
from minimax_train.model.row import Row
from parallel.pieces import cut_row


def to_row(row: DataRow, session: Session, source: int = 0) -> Row:
    """What this rank holds of the row, on its device. `source`: the number of the source that gave it.

    A row that the layout cannot share out evenly (held-out ones; training's divide) is filled up by one more document without labels.
    ValueError, on every rank that shares the row, where cu_seqlens falls or does not cover it.
    """
    layout = session.groups.layout
    tokens, labels, positions = (torch.from_numpy(x) for x in (row.tokens, row.labels, row.positions))
    bounds = row.cu_seqlens.tolist()
    if cut_row(bounds, 1).tokens != len(tokens):
        raise ValueError(f"cu_seqlens ends at {bounds[-1]} in a row of {len(tokens)} tokens; it must end where the row does")
    missing = -len(tokens) % math.lcm(layout.pieces, layout.context * layout.tensor)
    if missing:
        tokens, labels = F.pad(tokens, (0, missing)), F.pad(labels, (0, missing), value=NOTHING_TO_PREDICT)
        positions, bounds = torch.cat([positions, torch.arange(missing)]), [*bounds, len(tokens)]
    whole = Row(tokens=tokens, positions=positions, pieces=cut_row(bounds, 1), source=source).with_labels(labels)
    return whole.cut(layout, session.groups.context.rank).to(session.device)
