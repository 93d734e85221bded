"""Held-out documents, and what they say."""

from data.batches import Row, held_out_rows
from data.dataset import TokenDataset
from minimax_train.engine.batch import Totals
from minimax_train.engine.trainer import Trainer
from minimax_train.train.rows import to_row


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


def score(trainer: Trainer, rows: list[Row]) -> Totals:
    """Each data-parallel rank scores its share of the rows; the sums are exact whatever the layout."""
    data = trainer.session.groups.data
    return trainer.score([to_row(row, trainer.session) for row in rows[data.rank() :: data.size()]])
