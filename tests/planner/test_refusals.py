"""Refused layouts say why and what would do instead, and that would; the verb's exit status, table and JSON."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from minimax_train.cli import main
from minimax_train.plan import Plan
from minimax_train.planner.machine import GIB, Machine, find_machine
from minimax_train.planner.refusals import with_layout
from minimax_train.planner.report import judge
from minimax_train.recipe import load_plan
from parallel.layout import Layout
from tests.recipes.test_recipes import NAMES, RANKS

H800 = find_machine("h800")


def said(plan: Plan, gpus: int, machine: Machine = H800) -> list[tuple[str, str]]:
    """(kind, text) of the first stage's refusals."""
    return [(refusal.kind, refusal.text) for refusal in judge(plan, gpus, machine).stages[0].refused]


def changed(recipe: str, **layout: Any) -> Plan:
    plan = load_plan(recipe)
    return with_layout(plan, 0, replace(plan.layout_of(0), **layout))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(":shape")])
def test_every_recipe_fits_the_gpus_it_is_for(name: str) -> None:
    gpus = next(gpus for part, gpus in RANKS.items() if part in name)
    assert judge(load_plan(name), gpus, H800).refused == []


def test_does_not_fit_and_what_would() -> None:
    """As shipped until it was planned: 128K of MiniMax-Text-01 over four context ranks."""
    plan = changed("recipes.text01:extend", context=4)
    ((kind, text),) = said(plan, 640)
    assert kind == "memory" and "pipeline rank 0 needs 97.5 GiB of the 74.6" in text and "activations 77" in text
    assert "recompute=full would fit (25.1 GiB)" in text
    assert said(with_layout(plan, 0, plan.layout_of(0), "full"), 640) == []


def test_what_would_fit_is_tried() -> None:
    """More ranks of one kind where recomputation is no way out; nothing where nothing is."""
    plan = with_layout(load_plan("recipes.ladder:hybrid_7b"), 0, Layout(expert=8), "full")
    small = Machine(name="small", memory=11 * GIB, reserve=0, source="made up")
    ((kind, text),) = said(plan, 64, small)
    change = re.search(r": layout\.(\w+)=(\d+) would fit", text)
    assert kind == "memory" and change is not None, text
    assert said(with_layout(plan, 0, replace(plan.layout_of(0), **{change[1]: int(change[2])})), 64, small) == []
    assert "no single change" in said(plan, 64, replace(small, memory=GIB))[0][1]


def test_groups_across_nodes() -> None:
    plan = changed("recipes.ladder:hybrid_7b", expert_tensor=16, expert=1)
    assert [kind for kind, text in said(plan, 64)] == ["node"]
    assert "layout.expert_tensor is 16" in said(plan, 64)[0][1] and "use one of 1, 2, 4, 8" in said(plan, 64)[0][1]
    assert said(plan, 64, replace(H800, per_node=16)) == []
    keys = changed("recipes.ladder:hybrid_7b", tensor=2, context=8, key_value=4)
    assert said(keys, 64) == []
    assert [kind for kind, _ in said(keys, 64, replace(H800, per_node=4))] == ["node"]
    assert "over 4 nodes" in judge(load_plan("recipes.text01:pretrain"), 640, H800).stages[0].notes[0]


def test_pipeline_ranks_with_unequal_softmax_layers() -> None:
    plan = changed("recipes.text01:extend_1m", pipeline=16)
    ((kind, text),) = said(plan, 1024)
    assert kind == "uneven" and "1.37 times the mean" in text and "softmax layers of each: 0, 1, 0, 1" in text
    even = [int(number) for number in text.rpartition("use one of ")[2].split(", ")]
    assert 10 in even and 16 not in even


def test_what_does_not_divide() -> None:
    plan = load_plan("recipes.ladder:hybrid_7b")
    assert said(plan, 60) == [("ranks", "60 GPUs, not a multiple of pipeline*expert*expert_tensor = 8: change the ranks or the layout")]
    ((kind, text),) = said(plan, 1024)
    assert kind == "ranks" and "512 rows in a batch" in text


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipes.ladder:hybrid_7b", "--gpus", "64", "--gpu", "h800"]) == 0
    told = capsys.readouterr()
    assert told.err == "" and told.out.count("  fits\n") == 5
    assert main(["plan", "recipes.ladder:hybrid_7b", "--gpus", "64", "--set", "stages.2.layout.context=2", "--json"]) == 2
    told = capsys.readouterr()
    tree = json.loads(told.out)
    assert [stage["fits"] for stage in tree["stages"]] == [True, True, False, True, True]
    refused = tree["stages"][2]
    (rank,) = refused["ranks"]
    parts = ("parameters", "gradients", "optimizer", "activations", "states", "logits", "working", "buffers")
    assert sum(rank[name] for name in parts) == rank["peak"] == refused["peak_bytes"] > tree["usable_bytes"]
    (line,) = told.err.splitlines()
    assert line.startswith("minimax-train: refused: stage '128K': does not fit")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "8", "--gpu", "tpu"], "--gpu is 'tpu'; use one of a100, h100, h200, h800"),
        (["--gpus", "8", "--set", "stages.0.layout.tensor=3"], "layout.tensor is 3"),
    ],
)
def test_bad_input(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipes.ladder:hybrid_1b", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("minimax-train: error: ") and says in line
