import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.batches import NOTHING_TO_PREDICT, assemble, check_vocabulary, held_out_rows, unigram_entropy
from data.dataset import TokenDataset
from data.format import file_of
from data.shuffle import shuffled
from data.stream import Stream
from data.views import of_length
from tests.data.in_memory import check_row, dataset_of, segments, stream_of

lengths_of_documents = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def test_order_depends_on_seed_and_epoch_and_stays_for_ever() -> None:
    """The list is a recorded value: a resumed run on another numpy must see the same order."""
    orders = {(seed, epoch): tuple(shuffled(50, seed=seed, epoch=epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert shuffled(10, seed=1234, epoch=1).tolist() == [0, 9, 5, 6, 4, 2, 8, 1, 7, 3]
    for seed, epoch in ((-1, 0), (2**63, 0), (0, -1)):
        with pytest.raises(ValueError, match="below 2"):
            shuffled(3, seed=seed, epoch=epoch)


@given(lengths=lengths_of_documents, length=st.integers(1, 70))
def test_held_out_rows_predict_every_token_but_the_first_of_a_document_once(lengths: list[int], length: int) -> None:
    dataset = dataset_of(lengths)
    rows = list(held_out_rows(dataset, length))
    for row in rows:
        assert 0 < len(row.tokens) <= length
        check_row(dataset, row)
    places = [(document, start) for row in rows for document, start in zip(row.documents.tolist(), row.starts.tolist(), strict=True)]
    assert places == sorted(places)  # documents in order, pieces in order
    sizes = [piece.stop - piece.start for row in rows for piece in segments(row)]
    for (document, start), size in zip(places, sizes, strict=True):
        assert start % length == 0
        assert start == 0 or start + 1 < lengths[document]  # an EOD alone predicts nothing
        assert size == min(length, lengths[document] - start)  # never split but at `length`
    for row, following in itertools.pairwise(rows):
        assert len(row.tokens) + following.cu_seqlens[1] > length  # packed greedily

    labels = np.concatenate([row.labels for row in rows])
    predicted = sorted(labels[labels != NOTHING_TO_PREDICT].tolist())
    assert predicted == sorted(token for document in range(len(lengths)) for token in dataset.tokens(document)[1:].tolist())
    if predicted:
        entropy = -sum(n / len(predicted) * math.log(n / len(predicted)) for n in Counter(predicted).values())
        assert unigram_entropy(rows) == pytest.approx(entropy, rel=1e-12, abs=1e-12)
    else:
        with pytest.raises(ValueError, match="nothing to predict"):
            unigram_entropy(rows)


def test_a_real_dataset_in_rows(prefix: Path) -> None:
    dataset = TokenDataset.open(prefix)
    for first in range(0, dataset.token_count - 64, 64):
        check_row(dataset, assemble(dataset, Stream(of_length(dataset), 1).pieces(first, first + 64), 64))
    assert 0 < unigram_entropy(held_out_rows(dataset, 64)) < math.log(dataset.vocabulary)


def test_ids_the_model_or_the_vocabulary_does_not_have_are_refused(prefix: Path) -> None:
    dataset = TokenDataset.open(prefix)
    largest = int(dataset.stream.max())
    check_vocabulary(dataset, largest + 1)
    with pytest.raises(ValueError, match=rf"uses token {largest} .*the model's vocabulary is {largest}:"):
        check_vocabulary(dataset, largest)

    binary = file_of(prefix, ".bin")
    content = bytearray(binary.read_bytes())
    content[2:4] = (50_000).to_bytes(2, "little")  # same size: opening does not read it
    binary.write_bytes(content)
    damaged = TokenDataset.open(prefix)
    with pytest.raises(ValueError, match="to 50000, expected 0 to 299"):
        assemble(damaged, Stream(of_length(damaged), 0).pieces(0, damaged.token_count), damaged.token_count)
    with pytest.raises(ValueError, match="to 50000, expected 0 to 299"):
        list(held_out_rows(damaged, 100))


def test_impossible_arguments_are_refused() -> None:
    dataset = dataset_of([3])
    for pieces, length in ((stream_of([3]).pieces(0, 3), 2), (stream_of([3]).pieces(0, 3).take(slice(0)), 2)):
        with pytest.raises(ValueError, match=f"pieces of {pieces.sizes.sum()} tokens for a row of 2"):
            assemble(dataset, pieces, length)
    with pytest.raises(ValueError, match="length 0"):
        next(held_out_rows(dataset, 0))
