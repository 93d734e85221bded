"""Length views: which documents they hold, that nothing is copied, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import TokenDataset
from data.views import of_length
from tests.data.in_memory import dataset_of


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), first=st.integers(1, 5), more=st.integers(1, 4))
def test_views_part_the_documents(lengths: list[int], first: int, more: int) -> None:
    """Short, medium and long: each document in exactly one, with its length."""
    dataset, found = dataset_of(lengths), []
    for at_least, below in ((0, first), (first, first + more), (first + more, None)):
        expected = [d for d, n in enumerate(lengths) if at_least <= n and (below is None or n < below)]
        if not expected:
            with pytest.raises(ValueError, match="has no document of"):
                of_length(dataset, at_least, below)
            continue
        view = of_length(dataset, at_least, below)
        assert view.dataset is dataset
        assert (view.documents.dtype, view.lengths.dtype) == (np.int64, np.int64)
        assert view.documents.tolist() == expected
        assert view.lengths.tolist() == [lengths[d] for d in expected]
        assert view.token_count == sum(lengths[d] for d in expected)
        found += expected
    assert sorted(found) == list(range(len(lengths)))


def test_an_empty_view_says_what_there_is(prefix: Path) -> None:
    dataset = TokenDataset.open(prefix)
    shortest, longest = dataset.lengths.min(), dataset.lengths.max()
    with pytest.raises(ValueError, match=rf"no document of 1,000,000 tokens or more; its 5 documents have {shortest} to {longest}: change"):
        of_length(dataset, 1_000_000)
    for at_least, below in ((5, 5), (-1, None), (7, 2)):
        with pytest.raises(ValueError, match=f"at_least is {at_least}, below is {below}"):
            of_length(dataset, at_least, below)
