"""No layout changes what is learnt: every layout of this table takes ten steps, and they are the ten steps of one rank.

Compared are each step's loss, gradient norm and balancing loss, every parameter's gradient of the first batch, and every weight at the
end, all whole; every rank is asked, and all have the same bits of the weights. The batches are packed: rows of one document, of many, and
of documents that begin on, before and after the borders of pieces.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from minimax_train.recipe import load_plan
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import Differences, Outcome, hybrid, same, train_on
from tests.parallel.packings import ROWS

STEPS, ROWS_IN_BATCH = 10, 4
PACKINGS = tuple(ROWS.values())
CHANGES: dict[str, Any] = {"model": hybrid(layers=4, experts=8)}  # for 8 ranks

LAYOUTS: dict[str, tuple[int, Layout]] = {
    "dp2": (2, Layout()),
    "dp4": (4, Layout()),
    "tp2": (2, Layout(tensor=2)),
    "tp4": (4, Layout(tensor=4)),
    "pp2": (2, Layout(pipeline=2)),
    "pp4": (4, Layout(pipeline=4)),
    "cp2": (2, Layout(context=2)),
    "cp4": (4, Layout(context=4)),
    "ep2": (2, Layout(expert=2, token_groups=2)),
    "ep4": (4, Layout(expert=4, token_groups=3)),
    "etp2": (2, Layout(expert_tensor=2)),
    "tp2*pp2": (4, Layout(tensor=2, pipeline=2)),
    "tp2*cp2": (4, Layout(tensor=2, context=2)),
    "tp2*ep2*etp1": (4, Layout(tensor=2, expert=2)),
    "ep2*etp2": (4, Layout(expert=2, expert_tensor=2, token_groups=2)),
    "pp2*ep2": (4, Layout(pipeline=2, expert=2)),
    "cp2*ep4": (4, Layout(context=2, expert=4)),
    "dp2*ep2": (4, Layout(expert=2)),
    "pp2*cp2": (4, Layout(pipeline=2, context=2)),
    "pp2 interleaved": (2, Layout(pipeline=2, virtual_pipeline=2)),
}
LARGE: dict[str, tuple[int, Layout]] = {
    "tp2*pp2*cp2": (8, Layout(tensor=2, pipeline=2, context=2)),
    "tp2*pp2*ep2*etp2": (8, Layout(tensor=2, pipeline=2, expert=2, expert_tensor=2)),
    "cp4*ep8": (8, Layout(context=4, expert=8)),
}
LONG = (*LARGE, "dp4", "tp4", "pp4", "cp4", "ep4")
"""Not in the default run: theirs are the 2 ranks of one kind, and 4 of two."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Of the table: a layout, and the differences of the rank that differs most."""

    name: str
    ranks: int
    differences: list[Differences]

    def __str__(self) -> str:
        worst = {field: max(getattr(d, field) for d in self.differences) for field in ("loss", "grad_norm", "auxiliary_loss", "weights")}
        gradient = max(self.differences, key=lambda d: d.gradient)
        figures = [worst["loss"], worst["grad_norm"], worst["auxiliary_loss"], worst["weights"], gradient.gradient]
        return f"{self.name:18}{self.ranks:5}" + "".join(f"{figure:10.1e}" for figure in figures) + f"  {gradient.gradient_name}"


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Line]]:
    """Printed when the last layout is done, whether the layouts are equal or not."""
    lines: list[Line] = []
    yield lines
    head = f"{'layout':18}{'ranks':>5}{'loss':>10}{'norm':>10}{'auxiliary':>10}{'weights':>10}{'gradient':>10}  of"
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        terminal = plugins.getplugin("terminalreporter")
        terminal.write_line("")
        terminal.section(f"worst relative differences from one rank, {STEPS} steps")
        for line in (head, *lines):
            terminal.write_line(str(line))


def train(place: Place, corpus: Path, layout: Layout) -> Outcome:
    return train_on(place, corpus, layout, CHANGES, steps=STEPS, rows_in_batch=ROWS_IN_BATCH, packings=PACKINGS)


@pytest.fixture(scope="module")
def one_rank(corpus: Path) -> Outcome:
    outcome: Outcome = run_ranks(1, train, corpus, Layout())[0]
    assert outcome.reports[0].grad_norm > 0.1
    assert outcome.reports[-1].loss < outcome.reports[0].loss
    return outcome


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in LAYOUTS | LARGE],
    ids=lambda name: name.replace(" ", "-").replace("*", "-"),
)
def test_equals_one_rank(corpus: Path, one_rank: Outcome, table: list[Line], name: str) -> None:
    ranks, layout = (LAYOUTS | LARGE)[name]
    outcomes = run_ranks(ranks, train, corpus, layout)
    table.append(Line(name=name, ranks=ranks, differences=[Differences.between(ours, one_rank) for ours in outcomes]))
    for ours in outcomes:
        same(ours, one_rank)
        for key, weight in outcomes[0].weights.items():
            assert torch.equal(ours.weights[key], weight), f"copies of {key} differ"


@pytest.mark.parametrize("name", [*LAYOUTS, *LARGE])
def test_the_tiny_recipe_takes_it(name: str) -> None:
    """Every stage of it, by --set and nothing else; test_layouts_cli trains some."""
    ranks, layout = (LAYOUTS | LARGE)[name]
    plan = load_plan("recipes.tiny:stdlib", [f"layout.{degree}={value}" for degree, value in asdict(layout).items()])
    plan.check_ranks(ranks)
    assert plan.layout == layout
