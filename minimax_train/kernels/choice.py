"""Which form of each operator a model runs: a value, made once when the model is built, and written into the run's log."""

from dataclasses import dataclass

import torch

from minimax_train.kernels import best_lightning_backend
from minimax_train.kernels.softmax_attention import best_softmax_backend


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Names of the forms: of lightning_attention, and of softmax_attention.causal_attention."""

    lightning: str
    softmax: str


def best_backends(device: torch.device, dtype: torch.dtype, head_size: int) -> Backends:
    """The fastest forms that are installed and take these heads."""
    return Backends(lightning=best_lightning_backend(device, dtype, head_size), softmax=best_softmax_backend(device, dtype, head_size))
