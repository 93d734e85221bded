"""Packed rows of documents: for training a pure function of (dataset, seed, length, sample number), for validation every document once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.dataset import TokenDataset
from data.shuffle import shuffled

NOTHING_TO_PREDICT = -100
"""Label of a document's last token; torch's cross_entropy ignores it by default."""
CUT_ORDER = 2**32
"""Added to the seed for the order of cuts, so that it has nothing to do with the order of documents."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Documents side by side. Each part of a document in the row is a segment and is independent of the others.

    tokens:      int64 [T]
    labels:      int64 [T], the next token of the same document (also at a cut), NOTHING_TO_PREDICT at a document's last token
    positions:   int64 [T], 0, 1, 2, ... in each segment: what is left of a document cut by a row's edge starts again at 0 in its next row
    cu_seqlens:  int32 [S+1], where segments start, and T; no segment is empty
    documents:   int64 [S], the document each segment is from
    starts:      int64 [S], its first token's place in that document: place = positions + starts of its segment
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]


class TrainingRows:
    """An endless stream of documents, shuffled anew each epoch, cut every `length` tokens, its cuts drawn in random order.

    The stream is epoch 0, epoch 1, ..., each all documents one after the other in an order drawn from (seed, epoch). Cut i holds its
    tokens i*length up to (i+1)*length. As many cuts as fit into an epoch make a block, and training takes each block's cuts in an order
    of its own: neighbouring cuts are often the same long document, and a model that sees one for many steps on end forgets the rest.
    A dataset shorter than a row works: the row then spans epochs.
    """

    def __init__(self, dataset: TokenDataset, *, seed: int, length: int) -> None:
        if length < 1 or seed < 0:
            raise ValueError(f"seed {seed}, length {length}: seed must be at least 0, length at least 1")
        self.dataset, self.seed, self.length = dataset, seed, length
        self.block = max(1, dataset.token_count // length)
        self._blocks: tuple[int, NDArray[np.int64]] | None = None
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}  # of the last two: a block reaches into a second

    def row(self, sample: int) -> Row:
        """Row number `sample`, of exactly `length` tokens. Any order of calls; going on within a block is fastest (its order is kept)."""
        if sample < 0:
            raise ValueError(f"sample {sample}: samples are counted from 0")
        block, place = divmod(sample, self.block)
        if self._blocks is None or self._blocks[0] != block:
            self._blocks = block, shuffled(self.block, seed=self.seed + CUT_ORDER, epoch=block)
        return self.cut(block * self.block + int(self._blocks[1][place]))

    def cut(self, number: int) -> Row:
        """Cut `number` of the stream, counted from 0."""
        first = number * self.length
        size = self.dataset.token_count
        pieces = []
        for epoch in range(first // size, (first + self.length - 1) // size + 1):
            start, stop = max(0, first - epoch * size), min(size, first + self.length - epoch * size)
            pieces.append(self._segments(epoch, start, stop))
        documents, starts, stops = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return _row(self.dataset, documents, starts, stops)

    def rows(self, first_sample: int = 0, step: int = 1) -> Iterator[Row]:
        """Rows first_sample, first_sample + step, ... without end: rank r of R takes first_sample + r and step R, whatever R is."""
        sample = first_sample
        while True:
            yield self.row(sample)
            sample += step

    def _segments(self, epoch: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """What lies in tokens `start` to `stop` of an epoch: documents, first places, places after the last; int64 [S] each."""
        if epoch not in self._epochs:
            order = shuffled(self.dataset.documents, seed=self.seed, epoch=epoch)
            kept = list(self._epochs.items())[-1:]
            self._epochs = dict([*kept, (epoch, (order, np.cumsum(self.dataset.lengths[order])))])
        order, all_ends = self._epochs[epoch]
        low = int(np.searchsorted(all_ends, start, side="right"))
        high = int(np.searchsorted(all_ends, stop, side="left")) + 1
        documents, ends = order[low:high], all_ends[low:high]
        begins = ends - self.dataset.lengths[documents]
        return documents, np.maximum(start, begins) - begins, np.minimum(stop, ends) - begins


def held_out_rows(dataset: TokenDataset, length: int) -> Iterator[Row]:
    """Every document once and in order, in rows of at most `length` tokens: a row is closed when the next piece does not fit.

    A document longer than `length` is split into pieces of `length` tokens (each starts again at position 0, see Row.starts), so every
    token of a document but its first is a label exactly once, whatever `length`. An end-of-document token that would be a piece of its
    own is left out: it predicts nothing.
    """
    if length < 1:
        raise ValueError(f"length {length}: a row holds at least 1 token")
    pieces = -(-np.maximum(dataset.lengths - 1, 1) // length)
    documents = np.repeat(np.arange(dataset.documents), pieces)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of the piece in its document
    starts = number * length
    stops = np.minimum(starts + length, dataset.lengths[documents])
    ends = np.cumsum(stops - starts)
    first, taken = 0, 0
    while first < len(documents):
        last = int(np.searchsorted(ends, taken + length, side="right"))
        yield _row(dataset, documents[first:last], starts[first:last], stops[first:last])
        first, taken = last, int(ends[last - 1])


def unigram_entropy(rows: Iterable[Row]) -> float:
    """-sum_v p_v ln p_v in nats per token, p the frequencies of the rows' labels: what the best model without context would reach.

    Raises ValueError when the rows have nothing to predict.
    """
    labels = np.concatenate([row.labels for row in rows])
    counts = np.bincount(labels[labels != NOTHING_TO_PREDICT])
    if not counts.any():
        raise ValueError("no document of these rows has a second token, so there is nothing to predict")
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def check_vocabulary(dataset: TokenDataset, vocabulary: int) -> None:
    """Raises ValueError when the dataset uses an id that a model of `vocabulary` ids does not have."""
    largest = dataset.sidecar.largest_token
    if largest >= vocabulary:
        raise ValueError(
            f"{dataset.prefix}: uses token {largest} (its tokenizer has {dataset.vocabulary} ids), the model's vocabulary is {vocabulary}: "
            "prepare the data with the model's tokenizer, or enlarge the model's vocabulary"
        )


def _row(dataset: TokenDataset, documents: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Row:
    """The row of these segments; each argument int64 [S]. Raises ValueError for an id outside the vocabulary."""
    lengths = stops - starts
    cu_seqlens = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    tokens = dataset.stream[positions + np.repeat(dataset.offsets[documents] + starts, lengths)].astype(np.int64)
    if tokens.max() >= dataset.vocabulary or tokens.min() < 0:
        found = f"ids from {tokens.min()} to {tokens.max()}"
        raise ValueError(f"{dataset.prefix}.bin: {found}, expected 0 to {dataset.vocabulary - 1}: damaged; prepare the dataset again")
    cut = stops < dataset.lengths[documents]
    following = dataset.stream[np.where(cut, dataset.offsets[documents] + stops, 0)].astype(np.int64)
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[cu_seqlens[1:] - 1] = np.where(cut, following, NOTHING_TO_PREDICT)
    return Row(
        tokens=tokens, labels=labels, positions=positions, cu_seqlens=cu_seqlens.astype(np.int32), documents=documents, starts=starts
    )
