"""Numbers that changed by themselves are found, and the rank named: weights, optimizer state, gradients."""

import math
from pathlib import Path

import pytest
import torch

from minimax_train.engine.replicas import BLOCK, Corruption, checksum, odd_ones, word_sum
from minimax_train.engine.session import session
from minimax_train.engine.state import shards
from minimax_train.engine.trainer import StepReport, Trainer
from minimax_train.train.rows import to_row
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import packed
from tests.support import little_plan

BAD = 2
Found = list[str]


def flip(x: torch.Tensor, place: int, bit: int = 0) -> None:
    """One bit of one number."""
    words = x.detach().view(-1).view({2: torch.int16, 4: torch.int32}[x.itemsize])
    words[place] ^= 1 << bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("total", [checksum, word_sum])
def test_every_single_flip_changes_the_sum(total: object, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(4096, generator=draw).to(dtype)
    assert callable(total)
    before = total(x)
    for _ in range(1000):
        place, bit = (int(torch.randint(n, (), generator=draw)) for n in (len(x), 8 * x.itemsize - 1))
        flip(x, place, bit)
        assert total(x) != before
        flip(x, place, bit)
    assert total(x) == before
    x[[1, 2]] = x[[2, 1]]
    assert total(x) != before  # a swap keeps a plain sum


def test_places_count_beyond_a_block() -> None:
    x = torch.zeros(BLOCK + 8, dtype=torch.int16)
    sums = []
    for place in (3, BLOCK + 3):
        x.zero_()
        x[place] = 1
        sums.append(int(word_sum(x.view(torch.bfloat16))))
    assert sums == [7, 2 * BLOCK + 7]


def test_the_minority_is_named() -> None:
    names = ["w", "v"]
    assert odd_ones([[1, 2]] * 4, [0, 1, 2, 3], names) == []
    assert odd_ones([[1, 2], [1, 2], [5, 2], [1, 2]], [4, 5, 6, 7], names) == ["rank 6 of 4, 5, 6, 7 has other numbers in w"]
    assert odd_ones([[1, 2], [9, 9]], [0, 1], names) == [f"rank {r} of 0, 1 has other numbers in w and 1 more weights" for r in (0, 1)]


def trainer_of(corpus: Path, place: Place, layout: Layout, work: object) -> Found:
    """What is found when a step is taken, then `work` done on one rank, and another step taken."""
    with session(layout=layout, place=place) as joined:
        trainer = Trainer(little_plan(corpus, layout=layout), joined)
        data = joined.groups.data
        rows = [to_row(packed([0, 20, 64], seed), joined) for seed in range(4)][data.rank() :: data.size()]
        trainer.step(rows, 1e-3, check=True)
        if place.rank == BAD:
            assert callable(work)
            work(trainer)
        try:
            report: StepReport = trainer.step(
                rows, 1e-3, lambda _, norm: None if math.isfinite(norm) and norm < 1e3 else "refused", check=True
            )
        except Corruption as error:
            return [str(error)]
        assert len(report.rank_norms) == place.size
        return report.blamed


def flip_a_norm(trainer: Trainer) -> None:
    """Behind the gather of weights, once they are used: in the backward pass."""
    weight = trainer.decoder.get_parameter("norm.weight")
    todo = [5]

    def once(_: torch.Tensor) -> None:
        if todo:
            flip(weight, todo.pop())

    trainer.decoder.get_parameter("embedding.weight").register_hook(once)


def flip_a_moment(trainer: Trainer) -> None:
    *_, (_, _, shard, _) = (one for one in shards(trainer.decoder, trainer.optimizer) if one[2]["param"].numel())
    flip(shard["exp_avg_sq"], 0)


def spoil_a_gradient(trainer: Trainer) -> None:
    trainer.decoder.get_parameter("blocks.1.attention.out_proj.weight").register_hook(lambda gradient: gradient * float("nan"))


def blow_up_a_gradient(trainer: Trainer) -> None:
    trainer.decoder.get_parameter("blocks.1.attention.out_proj.weight").register_hook(lambda gradient: gradient * 1e7)


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (flip_a_moment, "rank 2's exp_avg_sq of "),
        (spoil_a_gradient, "the gradient of rank 2 was no number before it was summed, in blocks.1.attention.out_proj.weight and 0 more"),
        (blow_up_a_gradient, "times the median rank's, most of all in blocks.1.attention.out_proj.weight"),
    ],
)
def test_the_rank_is_named(corpus: Path, work: object, found: str) -> None:
    for lines in run_ranks(4, on_four, corpus, Layout(), work):
        assert len(lines) == 1 and found in lines[0] and "rank 2" in lines[0]


def on_four(place: Place, corpus: Path, layout: Layout, work: object) -> Found:
    return trainer_of(corpus, place, layout, work)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(expert=2)], ids=["data 4", "tensor 2", "expert 2"])
def test_a_weight_that_flips_is_named(corpus: Path, layout: Layout) -> None:
    for lines in run_ranks(4, on_four, corpus, layout, flip_a_norm):
        assert lines == ["rank 2 of 0, 1, 2, 3 has other numbers in norm.weight"]
