"""Trading work for memory: a layer keeps its input alone, and runs a second time in the backward pass (arXiv 1604.06174)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from parallel.experts import Journey

Recompute = Literal["none", "selective", "full"]
"""selective: of the experts, gate and up alone (swiglu.py): what is largest and needs no exchange again."""


@dataclass
class FirstRun:
    """What a layer's first run leaves to its second."""

    journey: Journey | None = None
    """Of its experts' rows: 16 bytes a choice, and no second exchange of counts, nor a host that waits for them."""


def recomputed(layer: Callable[..., tuple[Tensor, Any]], x_TC: Tensor, *others: Any) -> tuple[Tensor, Any]:
    """layer(x, *others), of which x and the experts chosen are kept, and with a FirstRun among `others` their journey.

    The second run makes the same exchanges in the same order as the first, but for the counts of the journey: it is not cut short where
    the last kept tensor is made again, for another rank may wait. It takes the first run's choice of experts: a top k that flipped would
    send other rows.
    """
    choices = partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
    result: tuple[Tensor, Any] = checkpoint(
        layer, x_TC, *others, use_reentrant=False, preserve_rng_state=False, early_stop=False, context_fn=choices
    )
    return result
