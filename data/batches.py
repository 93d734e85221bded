"""Packed rows of documents: assembled from their pieces, for training; and for validation every document once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.dataset import TokenDataset
from data.stream import Pieces

NOTHING_TO_PREDICT = -100
"""Label of a document's last token; torch's cross_entropy ignores it by default."""
FILLING = -1
"""Row.documents' number for the segment that fills a row up: it is of no document and predicts nothing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Documents side by side. Each part of a document in the row is a segment and is independent of the others.

    tokens:      int64 [T]
    labels:      int64 [T], the next token of the same document (also at a cut), NOTHING_TO_PREDICT at a document's last token
    positions:   int64 [T], 0, 1, 2, ... in each segment: what is left of a document cut by a row's edge starts again at 0 in its next row
    cu_seqlens:  int32 [S+1], where segments start, and T; no segment is empty
    documents:   int64 [S], the document each segment is from (its number in the dataset), FILLING for the one that fills the row up
    starts:      int64 [S], its first token's place in that document: place = positions + starts of its segment
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]


def assemble(dataset: TokenDataset, pieces: Pieces, length: int) -> Row:
    """The row of exactly `length` tokens that holds these pieces in their order, none empty.

    What they leave is one more segment, of the end-of-document id, without labels. Raises ValueError for an id outside the vocabulary, and
    where the pieces hold more than `length` tokens or none.
    """
    sizes = pieces.sizes
    held = int(sizes.sum())
    if not 0 < held <= length:
        raise ValueError(f"{dataset.prefix}: pieces of {held} tokens for a row of {length}")
    missing = length - held
    if missing:
        sizes = np.append(sizes, missing)
    ends = np.cumsum(sizes)
    tokens, positions = np.empty(length, np.int64), np.empty(length, np.int64)
    counted = np.arange(int(sizes.max()))
    # slices: a gather over all tokens is slower
    firsts = dataset.offsets[pieces.documents] + pieces.starts
    for first, last, place in zip((ends - sizes).tolist(), ends.tolist(), firsts.tolist(), strict=False):
        tokens[first:last] = dataset.stream[place : place + last - first]
        positions[first:last] = counted[: last - first]
    tokens[held:], positions[held:] = dataset.eod, counted[:missing]
    _check_ids(dataset, tokens)
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[held:] = NOTHING_TO_PREDICT
    labels[ends[: len(pieces)] - 1] = _after(dataset, pieces)
    documents, starts = (np.append(x, y) if missing else x for x, y in ((pieces.documents, FILLING), (pieces.starts, 0)))
    cu_seqlens = np.concatenate([np.zeros(1, np.int32), ends.astype(np.int32)])
    return Row(tokens=tokens, labels=labels, positions=positions, cu_seqlens=cu_seqlens, documents=documents, starts=starts)


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
        parts = Pieces(documents=documents[first:last], starts=starts[first:last], stops=stops[first:last])
        yield assemble(dataset, parts, int(parts.sizes.sum()))
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


def _check_ids(dataset: TokenDataset, tokens: NDArray[np.int64]) -> None:
    if tokens.max() >= dataset.vocabulary or tokens.min() < 0:
        found = f"ids from {tokens.min()} to {tokens.max()}"
        raise ValueError(f"{dataset.prefix}.bin: {found}, expected 0 to {dataset.vocabulary - 1}: damaged; prepare the dataset again")


def _after(dataset: TokenDataset, pieces: Pieces) -> NDArray[np.int64]:
    """The token that follows each piece in its document, NOTHING_TO_PREDICT after a document's last."""
    cut = pieces.stops < dataset.lengths[pieces.documents]
    following = dataset.stream[np.where(cut, dataset.offsets[pieces.documents] + pieces.stops, 0)].astype(np.int64)
    return np.where(cut, following, NOTHING_TO_PREDICT)
