import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.batches import NOTHING_TO_PREDICT, Row, TrainingRows, check_vocabulary, held_out_rows, unigram_entropy
from data.dataset import TokenDataset
from data.format import Sidecar, file_of, length_histogram
from data.shuffle import shuffled

EOD = 0


def dataset_of(lengths: list[int]) -> TokenDataset:
    """In memory; every token but the EODs is another number, so that a token tells its place."""
    total = sum(lengths)
    stream = np.arange(1, total + 1, dtype=np.int32)
    stream[np.cumsum(lengths) - 1] = EOD
    sidecar = Sidecar(
        tool="test",
        source="",
        tokenizer_sha256="",
        vocabulary=total + 1,
        eod=EOD,
        dtype="int32",
        documents=len(lengths),
        tokens=total,
        largest_token=int(stream.max()),
        empty=0,
        duplicates=0,
        skipped=(),
        longest_document="",
        longest_tokens=max(lengths),
        length_histogram=length_histogram(np.array(lengths)),
        files={},
    )
    return TokenDataset(Path("memory"), sidecar, np.array(lengths, np.int64), stream)


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
        whole = dataset.tokens(document)
        assert start + size <= len(whole)
        assert row.tokens[segment].tolist() == whole[start : start + size].tolist()
        assert row.labels[segment].tolist() == [*whole.tolist(), NOTHING_TO_PREDICT][start + 1 : start + 1 + size]
        assert row.positions[segment].tolist() == list(range(size))


lengths_of_documents = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths=lengths_of_documents, length=st.integers(1, 70), seed=st.integers(0, 5))
def test_cuts_are_the_stream_and_each_epoch_has_every_token_once(lengths: list[int], length: int, seed: int) -> None:
    dataset = dataset_of(lengths)
    size = dataset.token_count
    count = -(-(3 * size) // length)
    rows = [TrainingRows(dataset, seed=seed, length=length).cut(number) for number in range(count)]
    for row in rows:
        assert len(row.tokens) == length
        check_row(dataset, row)
    places = np.concatenate(
        [np.repeat(dataset.offsets[row.documents] + row.starts, np.diff(row.cu_seqlens)) + row.positions for row in rows]
    )
    for epoch in range(3):
        part = places[epoch * size : (epoch + 1) * size]
        assert sorted(part.tolist()) == list(range(size))
        order = shuffled(len(lengths), seed=seed, epoch=epoch)
        assert part.tolist() == [place for d in order for place in range(dataset.offsets[d], dataset.offsets[d + 1])]


@given(lengths=lengths_of_documents, length=st.integers(1, 40), seed=st.integers(0, 5))
def test_rows_are_the_cuts_each_block_in_an_order_of_its_own(lengths: list[int], length: int, seed: int) -> None:
    rows = TrainingRows(dataset_of(lengths), seed=seed, length=length)
    places = [(row.documents.tolist(), row.starts.tolist()) for row in map(rows.row, range(3 * rows.block))]
    cuts = [(row.documents.tolist(), row.starts.tolist()) for row in map(rows.cut, range(3 * rows.block))]
    for block in range(3):
        part = slice(block * rows.block, (block + 1) * rows.block)
        assert sorted(places[part]) == sorted(cuts[part])


def test_neighbouring_rows_are_seldom_neighbouring_cuts() -> None:
    """One document of a thousand rows must not fill a thousand steps on end."""
    rows = TrainingRows(dataset_of([1000 * 8, *[8] * 1000]), seed=1, length=8)
    long = [int(np.argmax(rows.dataset.lengths)) in rows.row(sample).documents for sample in range(rows.block)]
    assert 950 <= sum(long) <= 1050
    assert 400 <= sum(a != b for a, b in itertools.pairwise(long[:1000])) <= 600  # about half, as of a fair coin; in order: 2


def test_the_same_rows_for_any_number_of_ranks_and_any_order_of_asking() -> None:
    dataset = dataset_of([5, 1, 40, 7, 7, 2, 19])
    length, count = 11, 32
    expected = [TrainingRows(dataset, seed=3, length=length).row(sample) for sample in range(count)]  # a fresh object: no order kept

    def same(a: Row, b: Row) -> bool:
        return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(Row))

    for ranks in (1, 2, 4):
        streams = [TrainingRows(dataset, seed=3, length=length).rows(rank, ranks) for rank in range(ranks)]
        found = [next(streams[sample % ranks]) for sample in range(count)]
        assert all(map(same, expected, found))
    backwards = TrainingRows(dataset, seed=3, length=length)
    assert all(same(expected[sample], backwards.row(sample)) for sample in reversed(range(count)))
    again = TrainingRows(dataset, seed=3, length=length).rows(9, 2)
    assert same(next(again), expected[9]) and same(next(again), expected[11])


def test_order_depends_on_seed_and_epoch_and_stays_for_ever() -> None:
    """The list is a recorded value: a resumed run on another numpy must see the same order."""
    orders = {(seed, epoch): tuple(shuffled(50, seed=seed, epoch=epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert shuffled(10, seed=1234, epoch=1).tolist() == [0, 9, 5, 6, 4, 2, 8, 1, 7, 3]
    for seed, epoch in ((-1, 0), (2**63, 0), (0, -1)):
        with pytest.raises(ValueError, match="below 2"):
            shuffled(3, seed=seed, epoch=epoch)


def test_a_row_longer_than_the_dataset_spans_epochs() -> None:
    dataset = dataset_of([3, 2])
    row = TrainingRows(dataset, seed=0, length=23).cut(1)
    check_row(dataset, row)
    assert Counter(row.documents.tolist()).most_common()[-1][1] >= 4


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
    rows = TrainingRows(dataset, seed=1, length=64)
    for sample in range(20):
        check_row(dataset, rows.row(sample))
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
        TrainingRows(damaged, seed=0, length=damaged.token_count).row(0)
    with pytest.raises(ValueError, match="to 50000, expected 0 to 299"):
        list(held_out_rows(damaged, 100))


def test_impossible_arguments_are_refused() -> None:
    dataset = dataset_of([3])
    for arguments in ({"length": 0}, {"length": 4, "seed": -1}):
        with pytest.raises(ValueError, match="at least"):
            TrainingRows(dataset, **{"seed": 0, **arguments})
    with pytest.raises(ValueError, match="counted from 0"):
        TrainingRows(dataset, seed=0, length=4).row(-1)
    with pytest.raises(ValueError, match="length 0"):
        next(held_out_rows(dataset, 0))
