"""A random order that stays the same for ever."""

import numpy as np
from numpy.typing import NDArray


def shuffled(count: int, *, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """0 ... count-1 in an order drawn from (seed, epoch); int64 [count]. Raises ValueError unless both are in 0 ... 2^63 - 1.

    Raw bits and a stable sort instead of numpy's own permutation: numpy promises to keep only the former the same in later versions.
    """
    if not (0 <= seed < 2**63 and 0 <= epoch < 2**63):
        raise ValueError(f"seed {seed}, epoch {epoch}: each must be at least 0 and below 2^63")
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)
