"""The documents of a view one after the other, epoch after epoch, without end."""

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.shuffle import shuffled
from data.views import View


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Parts of documents: int64 [P] each. `documents` are numbers in the dataset, `starts` and `stops` places in them."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each, int64 [P]."""
        return self.stops - self.starts

    def take(self, index: NDArray[np.int64] | slice) -> "Pieces":
        """Those at `index`."""
        return Pieces(documents=self.documents[index], starts=self.starts[index], stops=self.stops[index])


class Stream:
    """Epoch 0, epoch 1, ...: each all documents of the view, in an order drawn from (seed, epoch).

    A place in it is a number of tokens from its beginning. It has no end, and nothing of it depends on how it is packed. Keeps the orders
    of two epochs, 16 bytes a document each; not for two threads at once.
    """

    def __init__(self, view: View, seed: int) -> None:
        self.view, self.seed = view, seed
        self.size = view.token_count
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def pieces(self, first: int, last: int) -> Pieces:
        """What stands in tokens `first` up to `last`, in order: whole documents, but for the two at its ends."""
        parts = []
        for epoch in range(first // self.size, -(-last // self.size)):
            parts.append(self._pieces_of(epoch, max(0, first - epoch * self.size), min(self.size, last - epoch * self.size)))
        documents, starts, stops = (np.concatenate([getattr(part, name) for part in parts]) for name in ("documents", "starts", "stops"))
        return Pieces(documents=documents, starts=starts, stops=stops)

    def end_of_document(self, token: int) -> int:
        """Where the document that holds `token` ends."""
        epoch, place = divmod(token, self.size)
        ends = self._order(epoch)[1]
        return epoch * self.size + int(ends[np.searchsorted(ends, place, side="right")])

    def _pieces_of(self, epoch: int, first: int, last: int) -> Pieces:
        order, all_ends = self._order(epoch)
        low = int(np.searchsorted(all_ends, first, side="right"))
        high = int(np.searchsorted(all_ends, last, side="left")) + 1
        chosen, ends = order[low:high], all_ends[low:high]
        begins = ends - self.view.lengths[chosen]
        return Pieces(
            documents=self.view.documents[chosen], starts=np.maximum(first, begins) - begins, stops=np.minimum(last, ends) - begins
        )

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's documents as places in the view, and where each ends in the epoch."""
        if epoch not in self._epochs:
            order = shuffled(len(self.view.lengths), seed=self.seed, epoch=epoch)
            kept = list(self._epochs.items())[-1:]
            self._epochs = dict([*kept, (epoch, (order, np.cumsum(self.view.lengths[order])))])
        return self._epochs[epoch]


def seed_of(seed: int, name: str) -> int:
    """A seed for source `name` of a run with `seed`: 63 bits, so that no two sources share their orders."""
    return xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()) >> 1
