"""Some documents of a dataset, named by number: nothing is copied."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.dataset import TokenDataset


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Documents of one dataset.

    documents: int64 [V], their numbers in the dataset, ascending
    lengths:   int64 [V], tokens of each, end-of-document token included
    """

    dataset: TokenDataset
    documents: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def token_count(self) -> int:
        """Tokens of all its documents."""
        return int(self.lengths.sum())


def of_length(dataset: TokenDataset, at_least: int = 0, below: int | None = None) -> View:
    """The documents of at_least <= tokens < below (None: no bound above). ValueError where there is none, or the bounds cross."""
    if at_least < 0 or (below is not None and below <= at_least):
        raise ValueError(f"{dataset.prefix}: at_least is {at_least}, below is {below}: at_least must be 0 or more, and below greater")
    lengths = dataset.lengths
    chosen = lengths >= at_least if below is None else (lengths >= at_least) & (lengths < below)
    documents = np.flatnonzero(chosen).astype(np.int64)
    if not len(documents):
        found = f"its {len(lengths):,} documents have {lengths.min():,} to {lengths.max():,}" if len(lengths) else "it has no document"
        wanted = f"{at_least:,} tokens or more" if below is None else f"{at_least:,} to {below - 1:,} tokens"
        raise ValueError(f"{dataset.prefix} has no document of {wanted}; {found}: change at_least and below, or leave this source out")
    return View(dataset=dataset, documents=documents, lengths=lengths[documents].astype(np.int64))
