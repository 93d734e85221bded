"""Parameters and FLOPs against the published and derived figures."""

import pytest
import torch

from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.model.config import text01, tiny
from minimax_train.model.count import count_parameters, forward_flops, training_flops
from tests.support import little_model


def test_text01_has_the_released_number_of_parameters() -> None:
    count = count_parameters(text01())
    assert count.total == 456_089_655_296  # the checkpoint index's total_size, to the byte
    assert count.active == 45_944_920_064  # the quoted 45.9B
    assert sum(v for k, v in count.as_dict().items() if k not in ("parameters", "active", "active_with_head")) == count.total


@pytest.mark.parametrize(("length", "gflop"), [(8192, 96.0), (131_072, 116.1), (524_288, 180.5), (1_048_576, 266.4)])
def test_text01_forward_flops_per_token(length: int, gflop: float) -> None:
    """The derived table: 2 (45.9B + V h) + 2 N 8192 per softmax layer + 4 d^2 H per lightning layer."""
    flops = forward_flops(text01(), tokens=length, squares=length**2) / length
    assert flops / 1e9 == pytest.approx(gflop, abs=0.06)
    assert training_flops(text01(), tokens=length, squares=length**2) == pytest.approx(3 * flops * length)


@pytest.mark.parametrize("config", [tiny(), little_model(), little_model(rotary_dim=8, num_attention_heads=6)])
def test_count_is_what_the_model_has(config: object, alone: Session) -> None:
    decoder = bare(build_stage(config, alone, seed=None))  # type: ignore[arg-type]
    assert sum(p.numel() for p in decoder.parameters()) == count_parameters(config).total  # type: ignore[arg-type]


def test_counting_allocates_nothing() -> None:
    """Counting 456B parameters must be arithmetic: no tensor is made while it runs."""

    class NoTensors(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError(f"{func} was called")

    with NoTensors():
        count_parameters(text01())
        forward_flops(text01(), tokens=8192, squares=8192**2)
