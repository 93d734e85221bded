"""A checkpoint goes on under any layout: weights and moments to the bit, and the next step is the one its writer takes."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minimax_train.engine.session import session
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import STEPS, Outcome, hybrid, train, whole, worst

LAYOUTS: dict[str, tuple[int, Layout]] = {
    "1": (1, Layout()),
    "dp2": (2, Layout()),
    "pp2": (2, Layout(pipeline=2)),
    "pp2 interleaved": (2, Layout(pipeline=2, virtual_pipeline=2)),
    "tp2*cp2": (4, Layout(tensor=2, context=2)),
    "tp2*pp2": (4, Layout(tensor=2, pipeline=2)),
    "tp2*ep2": (4, Layout(tensor=2, expert=2)),  # and data 2: a rank has parts of rows of the weights that are cut along their columns
    "ep2*etp2": (4, Layout(expert=2, expert_tensor=2)),
    "pp2*ep4": (8, Layout(pipeline=2, expert=4)),
}
CHANGES = {"model": hybrid(layers=4, experts=8)}
Runs = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after STEPS steps, under the name of the layout that wrote them."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def writers(corpus: Path, saved: Path) -> Runs:
    """What a layout did that saved a checkpoint and took a step more; each is run once."""

    @cache
    def run(name: str) -> Outcome:
        ranks, layout = LAYOUTS[name]
        outcome: Outcome = run_ranks(ranks, train, corpus, layout, CHANGES, None, saved / name)[0]
        return outcome

    return run


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("tp2*ep2", "pp2*ep4"),
        pytest.param("tp2*ep2", "1", marks=pytest.mark.slow),
        ("tp2*cp2", "dp2"),
        pytest.param("pp2", "1", marks=pytest.mark.slow),
        ("pp2", "pp2 interleaved"),
        ("ep2*etp2", "1"),
        pytest.param("1", "ep2*etp2", marks=pytest.mark.slow),
        ("1", "tp2*pp2"),
    ],
    ids=lambda name: name.replace(" ", "-").replace("*", "-"),
)
def test_another_layout_goes_on(corpus: Path, saved: Path, writers: Runs, writer: str, reader: str) -> None:
    wrote = writers(writer)
    ranks, layout = LAYOUTS[reader]
    ours: Outcome = run_ranks(ranks, train, corpus, layout, CHANGES, saved / writer, None)[-1]
    assert wrote.state.keys() == ours.state.keys() == {"param", "exp_avg", "exp_avg_sq"}
    for kind, tensors in wrote.state.items():
        assert ours.state[kind].keys() == tensors.keys()
        assert all(torch.equal(ours.state[kind][name], tensor) for name, tensor in tensors.items()), kind
    (step,), (*_, expected) = ours.reports, wrote.reports
    assert len(wrote.reports) == STEPS + 1
    assert step.loss == pytest.approx(expected.loss, rel=1e-6)
    assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    assert worst(ours.weights, wrote.weights)[1] < 1e-6


def weights_alone(place: Place, layout: Layout, checkpoint: Path) -> dict[str, Tensor]:
    """What a start from a checkpoint's weights has, whole."""
    from minimax_train.model.parts import cuts_of

    with session(layout=layout, place=place) as joined:
        from minimax_train.checkpoint.shelf import verified_record
        from minimax_train.checkpoint.store import load_weights
        from minimax_train.engine.stage import bare, build_stage

        decoder = bare(build_stage(CHANGES["model"], joined, seed=77))
        load_weights(decoder, checkpoint, verified_record(checkpoint), joined.groups)
        assert all(cut.ranks == 2 for cut in cuts_of(decoder.blocks["0"].experts.gate_up))
        return {name: whole(p.detach(), p, joined) for name, p in decoder.named_parameters()}


def test_weights_alone(saved: Path, writers: Runs) -> None:
    """Gate and up are stacked, and a rank has a slice of each."""
    wrote = writers("1").state["param"]
    for ours in run_ranks(4, weights_alone, Layout(expert=2, expert_tensor=2), saved / "1"):
        assert ours.keys() == wrote.keys()
        assert all(torch.equal(ours[name], weight) for name, weight in wrote.items())
