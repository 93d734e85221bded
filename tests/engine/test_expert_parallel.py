"""Expert parallelism changes nothing: losses, every gradient, their norm, the auxiliary loss, optimizer steps, checkpoints."""

from pathlib import Path

import pytest

from parallel.layout import Layout
from parallel.testing import run_ranks
from tests.engine.equality import Outcome, same, train


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after STEPS steps, under the layout that wrote them."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def one_rank(corpus: Path, saved: Path) -> Outcome:
    outcome: Outcome = run_ranks(1, train, corpus, Layout(), {}, None, saved / "one")[0]
    return outcome


TWO = {"expert2": Layout(expert=2), "slices2": Layout(expert_tensor=2), "tensor2": Layout(tensor=2, expert=2)}
FOUR = {
    "expert4": Layout(expert=4),
    "expert2 slices2": Layout(expert=2, expert_tensor=2),
    "tensor2 expert2": Layout(tensor=2, expert=2),
    "tensor2 slices2": Layout(tensor=2, expert_tensor=2),
    "context2 expert4": Layout(context=2, expert=4),
    "data2 expert2": Layout(expert=2),
    "data2 slices2": Layout(expert_tensor=2),
}


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_equal_one(corpus: Path, one_rank: Outcome, name: str) -> None:
    for ours in run_ranks(2, train, corpus, TWO[name], {}, None, None):
        same(ours, one_rank)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one(corpus: Path, one_rank: Outcome, name: str) -> None:
    same(run_ranks(4, train, corpus, FOUR[name], {}, None, None)[3], one_rank)
