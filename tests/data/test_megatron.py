"""megatron-core's IndexedDataset reads what we write, and we read what it writes."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from data.dataset import TokenDataset
from data.format import file_of, parse_index
from data.prepare import prepare
from data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(params=[300, 65_499, 65_500, 65_536])
def sized(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of that many ids, on both sides of Megatron's 65,500, whose greatest id occurs in the texts."""
    engine = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    engine.add_tokens([f"{number}-filler" for number in range(request.param - 301)] + (["attend"] if request.param > 300 else []))
    (tmp_path / "tokenizer.json").write_text(engine.to_str())
    sized = load_tokenizer(tmp_path)
    assert sized.vocabulary == request.param
    return sized


def test_both_ways(tmp_path: Path, folder: Path, sized: Tokenizer) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    sidecar = prepare([folder], sized, ours, quiet=True)
    dataset = TokenDataset.open(ours)

    read = IndexedDataset(str(ours))
    assert len(read) == dataset.documents == 5
    assert read.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    for document in range(5):
        text = (folder / f"{document}.txt").read_bytes().decode()
        expected = [*sized.encode([text])[0], sized.eod]
        assert read[document].tolist() == dataset.tokens(document).tolist() == expected
    assert sidecar.largest_token == (sized.vocabulary - 1 if sized.vocabulary > 300 else max(map(max, read)))

    builder = IndexedDatasetBuilder(str(file_of(theirs, ".bin")), dtype=DType.optimal_dtype(sized.vocabulary))
    for document in range(5):
        builder.add_document(torch.from_numpy(dataset.tokens(document)), [dataset.lengths[document]])
    builder.finalize(str(file_of(theirs, ".idx")))
    for suffix in (".bin", ".idx"):
        assert file_of(theirs, suffix).read_bytes() == file_of(ours, suffix).read_bytes()
    dtype, lengths = parse_index(file_of(theirs, ".idx").read_bytes(), theirs)
    assert dtype.name == sidecar.dtype == ("uint16" if sized.vocabulary < 65_500 else "int32")
    np.testing.assert_array_equal(lengths, dataset.lengths)
