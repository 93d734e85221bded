"""Does the model find what stands far back? Needles in a haystack, by length and depth.

One forward pass a sample, with the true answer fed in: under greedy decoding the answer is right exactly when every one of its tokens is
the likeliest given the true ones before it. So nothing is generated, and ranks share a sample's row as in training.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.batches import NOTHING_TO_PREDICT
from data.batches import Row as DataRow
from data.needles import Sample, Task, Words
from minimax_train.engine.session import Session
from minimax_train.evaluate.answers import said_at
from minimax_train.evaluate.grid import Grid
from minimax_train.model.decoder import Decoder
from minimax_train.train.rows import to_row
from parallel.collectives import all_sum


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What came of one task at one length and depth."""

    task: Task
    length: int
    depth: float
    samples: int
    accuracy: float
    """Of whole answers."""
    token_accuracy: float
    """Of the answers' tokens, each given the true ones before it."""
    loss: float
    """Mean of the answers' tokens, nats."""


def score(decoder: Decoder, words: Words, grid: Grid, session: Session, *, told: Callable[[str], None] = lambda line: None) -> list[Cell]:
    """Every cell, the same on all ranks, which call it together; data-parallel ranks share the samples of a task and length.

    `told` gets a line after each task and length. ValueError where a length is too short for a task.
    """
    for task in grid.tasks:  # before hours are spent on the others
        for length in (min(grid.lengths), max(grid.lengths)):
            grid.sample(words, task, length, grid.depths[0], 0)
    cells: list[Cell] = []
    for task in grid.tasks:
        for length in grid.lengths:
            found = _cells(decoder, words, grid, session, task, length)
            told(f"{task} at {length:,}: {sum(cell.accuracy for cell in found) / len(found):.0%} right")
            cells += found
    return cells


def _cells(decoder: Decoder, words: Words, grid: Grid, session: Session, task: Task, length: int) -> list[Cell]:
    """The cells of one task and length. Every rank runs as many samples as the others, for ranks exchange tokens with each other's
    experts; what keeps others company is not counted again."""
    data = session.groups.data
    asked = [(depth, number) for depth in grid.depths for number in range(grid.samples)]
    sums = torch.zeros(len(asked), 4, dtype=torch.float64, device=session.device)  # right answers, right tokens, tokens, loss
    for turn in range(-(-len(asked) // data.size())):
        mine = turn * data.size() + data.rank()
        figures = _figures(decoder, grid.sample(words, task, length, *asked[min(mine, len(asked) - 1)]), session)
        if mine < len(asked):
            sums[mine] = figures
    answers, tokens, count, loss = all_sum(sums, data).view(len(grid.depths), grid.samples, 4).sum(1).unbind(1)
    by_depth = zip(grid.depths, (answers / grid.samples).tolist(), (tokens / count).tolist(), (loss / count).tolist(), strict=True)
    return [Cell(task=task, length=length, depth=d, samples=grid.samples, accuracy=a, token_accuracy=t, loss=x) for d, a, t, x in by_depth]


def _figures(decoder: Decoder, sample: Sample, session: Session) -> torch.Tensor:
    """1 where the whole answer is right, its right tokens, its tokens, and its summed loss: `[4]` fp64."""
    (answer,) = sample.answers
    row = to_row(sample_row(sample), session)
    places = [place - 1 for place in answer]
    said = said_at(decoder, row, places, [sample.ids[place] for place in answer], session.groups)
    right = said.right.double()
    return torch.stack([right.prod(), right.sum(), right.new_tensor(len(answer)), said.loss.sum()])


def sample_row(sample: Sample) -> DataRow:
    """The sample as a row of one document in which the answers' tokens alone are labels."""
    tokens = np.array(sample.ids, dtype=np.int64)
    labels = np.full_like(tokens, NOTHING_TO_PREDICT)
    for answer in sample.answers:
        labels[answer.start - 1 : answer.stop - 1] = tokens[answer.start : answer.stop]
    one = np.zeros(1, dtype=np.int64)
    ends = np.array([0, len(tokens)], dtype=np.int32)
    return DataRow(tokens=tokens, labels=labels, positions=np.arange(len(tokens)), cu_seqlens=ends, documents=one, starts=one)


def needle_table(cells: Sequence[Cell]) -> str:
    """The figures as text: for each task a line a length, the accuracy at each depth in percent, then means over the depths."""
    return "\n".join(_lines(cells))


def _lines(cells: Sequence[Cell]) -> Iterator[str]:
    depths = list(dict.fromkeys(cell.depth for cell in cells))
    yield (
        f"{'task':12}{'length':>10}  right, % at depth"
        + "".join(f"{depth:6.0%}" for depth in depths)
        + f"{'mean':>8}{'tokens':>8}{'nats':>8}"
    )
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        row = [cell for cell in cells if (cell.task, cell.length) == (task, length)]
        mean, tokens, loss = (sum(getattr(c, name) for c in row) / len(row) for name in ("accuracy", "token_accuracy", "loss"))
        shown = "".join(f"{100 * cell.accuracy:6.0f}" for cell in row)
        yield f"{task:12}{length:>10,}{'':19}{shown}{100 * mean:8.0f}{100 * tokens:8.0f}{loss:8.3f}"
