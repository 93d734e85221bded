"""Datasets in memory whose every token tells its place, and rows held against them."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from data.batches import FILLING, NOTHING_TO_PREDICT, Row
from data.dataset import TokenDataset
from data.stream import Stream
from data.views import View, of_length

EOD = 0


def dataset_of(lengths: list[int]) -> TokenDataset:
    """In memory; every token but the EODs is another number, so that a token tells its place."""
    total = sum(lengths)
    stream = np.arange(1, total + 1, dtype=np.int32)
    stream[np.cumsum(lengths) - 1] = EOD
    sidecar = SimpleNamespace(vocabulary=total + 1, eod=EOD, largest_token=int(stream.max()), tokenizer_sha256="")
    return TokenDataset(Path("memory"), cast(Any, sidecar), np.array(lengths, np.int64), stream)


def segments(row: Row) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise(row.cu_seqlens.tolist())]


def check_row(dataset: TokenDataset, row: Row) -> None:
    """Everything Row promises, document by document, against the documents themselves."""
    assert (row.tokens.dtype, row.labels.dtype, row.positions.dtype, row.cu_seqlens.dtype) == ("int64", "int64", "int64", "int32")
    assert len(row.tokens) == len(row.labels) == len(row.positions) == row.cu_seqlens[-1]
    assert row.cu_seqlens[0] == 0
    assert len(row.cu_seqlens) == len(row.documents) + 1 == len(row.starts) + 1
    for segment, document, start in zip(segments(row), row.documents.tolist(), row.starts.tolist(), strict=True):
        size = segment.stop - segment.start
        assert size > 0
        assert row.positions[segment].tolist() == list(range(size))
        if document == FILLING:
            assert segment.stop == len(row.tokens)
            assert set(row.tokens[segment].tolist()) == {EOD}
            assert set(row.labels[segment].tolist()) == {NOTHING_TO_PREDICT}
            continue
        whole = dataset.tokens(document)
        assert start + size <= len(whole)
        assert row.tokens[segment].tolist() == whole[start : start + size].tolist()
        assert row.labels[segment].tolist() == [*whole.tolist(), NOTHING_TO_PREDICT][start + 1 : start + 1 + size]
        assert row.positions[segment].tolist() == list(range(size))


def stream_of(lengths: list[int], seed: int = 0) -> Stream:
    return Stream(of_length(dataset_of(lengths)), seed)


def places_of(view: View, row: Row) -> list[int]:
    """Where in the dataset each token of the row stands, in the row's order; what fills it up is left out."""
    of_segments = [
        range(int(view.dataset.offsets[d] + s), int(view.dataset.offsets[d] + s) + piece.stop - piece.start)
        for piece, d, s in zip(segments(row), row.documents.tolist(), row.starts.tolist(), strict=True)
        if d != FILLING
    ]
    return [place for places in of_segments for place in places]
