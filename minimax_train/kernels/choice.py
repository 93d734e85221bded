"""Which form of each operator a model runs: a value, made once when the model is built, and written into the run's log."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minimax_train.kernels import best_lightning_backend
from minimax_train.kernels.grouped_linear import Asked, grouped_backend
from minimax_train.kernels.softmax_attention import best_softmax_backend


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Names of the forms: of lightning_attention, of softmax_attention.causal_attention, and of grouped_linear (experts)."""

    lightning: str
    softmax: str
    experts: str = "loop"


def best_backends(
    device: torch.device, dtype: torch.dtype, head_size: int, expert_sizes: Sequence[int] = (), experts: Asked = "auto"
) -> Backends:
    """The fastest forms that are installed and take these heads, and experts of these inputs and outputs on a rank, or the form of the
    latter that is asked for; ValueError where that cannot run."""
    return Backends(
        lightning=best_lightning_backend(device, dtype, head_size),
        softmax=best_softmax_backend(device, dtype, head_size),
        experts=grouped_backend(experts, device, dtype, *expert_sizes),
    )
