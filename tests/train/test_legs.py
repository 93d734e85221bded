"""Stages of different layouts in one run: the curve goes on as if nothing had changed, wherever it is stopped."""

import json
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from minimax_train.cli import main
from minimax_train.engine.session import Session, session
from minimax_train.plan import Plan
from minimax_train.recipe import as_yaml
from minimax_train.train.legs import check_turn, next_stage, train_legs
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place, meet
from tests.support import little_plan

LAYOUTS = (Layout(), Layout(context=2), Layout(context=4), Layout(tensor=2, expert=2))


def staged(corpus: Path, *layouts: Layout | None) -> Plan:
    """Stages of 64, 128, 256 ... tokens with 3 steps each, four rows in a batch."""
    first = little_plan(corpus).stages[0]
    fields = dict(first.__dict__)
    stages = []
    for number, layout in enumerate(layouts):
        length = 64 * 2**number
        size = {"name": str(length), "length": length, "batch_tokens": 4 * length, "tokens": 12 * length, "rope_base": 1e4 * 2**number}
        stages.append(type(first)(**{**fields, **size, "layout": layout}))
    return little_plan(corpus, stages=tuple(stages))


def train(place: Place, plan: Plan, run: Path, begin: int = 0, only: str | None = None) -> int:
    """One rank's part in the run; returns how many sessions it had."""
    store, opened = meet(place), []

    def open_session(layout: Layout, number: int) -> AbstractContextManager[Session]:
        opened.append(layout)
        return session("cpu", layout, place, store=store, number=number)

    train_legs(plan, run, open_session, begin, only=only)
    return len(opened)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[float]:
    """Losses and validation losses, in order."""
    return [line.get("loss", line.get("validation_loss", 0.0)) for line in lines(run)]


def test_the_curve_goes_on_through_changes_of_layout(corpus: Path, tmp_path: Path) -> None:
    """data 4 -> context 2 -> context 4 -> tensor 2, expert 2, in one command; and the same again stage by stage, to the bit."""
    run_ranks(4, train, staged(corpus, *[None] * 4), tmp_path / "one layout")
    plan = staged(corpus, *LAYOUTS)
    assert run_ranks(4, train, plan, tmp_path / "whole") == [4] * 4
    assert curve(tmp_path / "whole") == pytest.approx(curve(tmp_path / "one layout"), rel=2e-5)
    for number, stage in enumerate(plan.stages):
        if number < 3:
            with pytest.raises(ValueError, match=f"still in stage '{stage.name}'"):
                check_turn(plan, tmp_path / "parts", "512")
        wrong_guess = number - 1 if number == 2 else number  # costs a session, no more
        assert run_ranks(4, train, plan, tmp_path / "parts", wrong_guess, stage.name) == [1 + (number == 2)] * 4
        assert next_stage(tmp_path / "parts") == number + 1
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) > 12


def test_a_stage_whose_turn_it_is_not(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(as_yaml(staged(corpus, None, None)))
    for name, says in (("128", f"--stage 128: {tmp_path / 'run'} is still in stage '64'"), ("7", "--stage 7: the plan has 64, 128")):
        assert main(["train", str(recipe), "--to", str(tmp_path / "run"), "--stage", name]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (Layout(tensor=3), "layout.tensor is 3"),
        (Layout(context=3), r"stage '128': length is 128, not a multiple of 6"),
        (Layout(expert=3), "layout.expert is 3"),
        (Layout(pipeline=8), "8 chunks"),
    ],
)
def test_a_stages_layout_is_checked(corpus: Path, layout: Layout, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        staged(corpus, None, layout)


def test_ranks_are_checked_for_every_stage(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"2 ranks were started, not a multiple of pipeline\*context\*tensor = 4"):
        staged(corpus, Layout(), Layout(context=4)).check_ranks(2)
