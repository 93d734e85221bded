"""Files written by megatron-core's own builder become datasets, or are refused for a reason."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.adopt import adopt
from data.dataset import TokenDataset, verify
from data.format import file_of
from data.tokenizer import Tokenizer


def write(prefix: Path, documents: list[list[list[int]]]) -> None:
    """Megatron's files of documents, each a list of sequences; [] is what its tool writes for an empty text."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(file_of(prefix, ".bin")), dtype=np.uint16)
    for sequences in documents:
        if sequences:
            builder.add_document(torch.tensor(sum(sequences, [])), [len(sequence) for sequence in sequences])
        else:
            builder.end_document()
    builder.finalize(str(file_of(prefix, ".idx")))


def test_megatrons_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = tmp_path / "theirs"
    write(prefix, [[[5, 6, 0]], [], [[7, 0, 8], [9, 299, 0]], [], [], [[0]]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"theirs.json: no such file; a dataset is named by"):
        TokenDataset.open(prefix)
    sidecar = adopt(prefix, tokenizer)
    assert (sidecar.documents, sidecar.tokens, sidecar.empty, sidecar.inner_ends, sidecar.largest_token) == (3, 10, 3, 1, 299)
    dataset = verify(prefix, tokenizer=tokenizer)
    assert [dataset.tokens(number).tolist() for number in range(3)] == [[5, 6, 0], [7, 0, 8, 9, 299, 0], [0]]
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(after) - set(before) == {"theirs.json", "theirs.tokenizer.json"}
    assert before.items() <= after.items()
    with pytest.raises(ValueError, match="is there already"):
        adopt(prefix, tokenizer)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[[5, 6]], [[7, 8]]], "occurs 0 times in 2 documents.*--append-eod"),
        ([[[5, 0, 6]], [[7, 0]]], "document 0 ends with 6, expected the end-of-document id 0"),
        ([[[5, 300, 0]]], "token 300, expected 0 to 299"),
        ([[], []], "no document holds a token"),
    ],
)
def test_what_the_tokenizer_cannot_have_made_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, documents: list[list[list[int]]], message: str
) -> None:
    prefix = tmp_path / "theirs"
    write(prefix, documents)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        adopt(prefix, tokenizer)
    assert sorted(tmp_path.iterdir()) == before


def test_missing_and_truncated_files_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = tmp_path / "theirs"
    with pytest.raises(ValueError, match=r"theirs.idx: no such file; adopted are"):
        adopt(prefix, tokenizer)
    write(prefix, [[[5, 6, 0]]])
    binary = file_of(prefix, ".bin")
    binary.write_bytes(binary.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"theirs.bin: 4 bytes, expected 6 .*truncated"):
        adopt(prefix, tokenizer)
