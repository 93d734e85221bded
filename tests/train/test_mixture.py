"""Runs on several sources: what a plan may say, what is refused before a model is built, and killing one inside a transition."""

import dataclasses
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from data.sampler import Bookmark
from minimax_train.checkpoint.record import Record, read_record
from minimax_train.checkpoint.shelf import checkpoints_in
from minimax_train.plan import Data, Mixture, Plan, Source, Stage
from minimax_train.recipe import as_plan, as_tree, as_yaml
from minimax_train.train.resume import open_data
from minimax_train.train.stage_rows import planned_epochs, stage_shares
from tests.support import little_plan
from tests.train.test_resume import figures, kill_at_step, run

RAMP, LATE = 4 * 256, {"short": 0.25}


def sources(corpus: Path) -> dict[str, Source]:
    """Two parts of one file, and another file whole."""
    train = str(corpus / "train")
    return {
        "short": Source(prefix=train, below=400),
        "long": Source(prefix=train, at_least=400),
        "more": Source(prefix=str(corpus / "validation")),
    }


def mixed_plan(corpus: Path, **changes: Any) -> Plan:
    """Two stages: short documents, then long ones by and by, with short ones again at the end; best fit, then cuts."""
    plan = little_plan(corpus)
    first, second = plan.stages
    data = Data(sources=sources(corpus), validation=str(corpus / "validation"), window_tokens=1000)
    stages = (
        dataclasses.replace(first, mixture=Mixture(weights={"short": 3, "more": 1}), packing="best_fit"),
        dataclasses.replace(
            second, length=128, tokens=8 * 256, batch_tokens=256, mixture=Mixture(weights={"long": 1}, ramp_tokens=RAMP, late=LATE)
        ),
    )
    return little_plan(corpus, **{"data": data, "stages": stages, **changes})


def test_shares_are_what_the_plan_says(corpus: Path) -> None:
    """16 rows in the second stage: a ramp of 8, plateau to 13 (a fifth is 3 rows, rounded down), then the late part."""
    plan = mixed_plan(corpus)
    first, second = (stage_shares(plan, number) for number in (0, 1))
    exact = [[Fraction(s.total(i, n + 1) - s.total(i, n), s.unit) for i in range(3)] for s in (first, second) for n in range(16)]
    assert exact[:16] == [[Fraction(3, 4), 0, Fraction(1, 4)]] * 16
    for n, (short, long, more) in enumerate(exact[16:]):
        t = Fraction(2 * n + 1, 16)
        expected = [(1 - t) * 3 / 4, t, (1 - t) / 4] if n < 8 else [0, 1, 0] if n < 13 else [Fraction(1, 4), Fraction(3, 4), 0]
        assert [short, long, more] == expected


def test_plans_with_sources_are_yaml_and_back(corpus: Path) -> None:
    plan = mixed_plan(corpus)
    assert as_plan(as_tree(plan)) == plan
    assert "at_least: 400" in as_yaml(plan)
    assert list(little_plan(corpus).data.by_name) == ["train"]
    for path, says in (
        (("data", "sources", "long", "belov"), "unknown plan key 'data.sources.long.belov': did you mean 'below'?"),
        (("stages", 1, "mixture", "weigths"), "unknown plan key 'stages.1.mixture.weigths': did you mean 'weights'?"),
    ):
        tree: Any = as_tree(plan)
        place = tree
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = 1
        with pytest.raises(ValueError) as refused:
            as_plan(tree)
        assert says in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weights": {"short": -1.0}}, "mixture.weights.short is -1.0; it must be a finite number, at least 0"),
        ({"weights": {"short": float("nan")}}, "mixture.weights.short is nan; it must be a finite number"),
        ({"weights": {"short": float("inf")}}, "mixture.weights.short is inf; it must be a finite number"),
        ({"weights": {"short": 0.0, "long": 0.0}}, "at least one source needs a weight above 0"),
        ({"weights": {}}, "mixture.weights are none; at least one source needs a weight above 0"),
        ({"weights": {"short": 1}, "late": {"long": -0.1}}, "mixture.late.long is -0.1"),
        ({"weights": {"short": 1}, "late": {"long": 0.7, "more": 0.4}}, "mixture.late sums to 1.1; these are shares of all rows"),
        ({"weights": {"short": 1}, "late": {"short": 0.5}}, "no other source has a weight to share the rest"),
        ({"weights": {"short": 1}, "late_fraction": 0.0}, "mixture.late_fraction is 0.0; it must be above 0 and at most 1"),
        ({"weights": {"short": 1}, "late_fraction": float("nan")}, "mixture.late_fraction is nan"),
        ({"weights": {"short": 1}, "ramp_tokens": -1}, "mixture.ramp_tokens is -1"),
    ],
)
def test_impossible_mixtures_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as refused:
        Mixture(**fields)
    assert says in str(refused.value)


def changed(plan: Plan, number: int, **fields: Any) -> Plan:
    """The plan with one stage's mixture other."""
    stages = list(plan.stages)
    mixture = stages[number].mixture
    assert mixture is not None
    stages[number] = dataclasses.replace(stages[number], mixture=dataclasses.replace(mixture, **fields))
    return dataclasses.replace(plan, stages=tuple(stages))


def test_impossible_plans_are_refused(corpus: Path) -> None:
    plan = mixed_plan(corpus)
    validation, one = plan.data.validation, {"a": Source(prefix="x")}
    no_mixture: tuple[Stage, ...] = (plan.stages[0], dataclasses.replace(plan.stages[1], mixture=None))
    for make, says in (
        (lambda: changed(plan, 1, weights={"lnog": 1.0}), "mixture names source 'lnog'; data has short, long, more"),
        (lambda: changed(plan, 1, late={"qa": 0.1}), "mixture names source 'qa'; data has short, long, more"),
        (lambda: changed(plan, 0, ramp_tokens=256), "no stage comes before it: set it to 0"),
        (lambda: changed(plan, 1, ramp_tokens=8 * 256), "within the stage's first 1664 tokens (then mixture.late begins)"),
        (lambda: changed(plan, 1, ramp_tokens=8 * 256 + 1, late={}), "within the stage's first 2048 tokens"),
        (lambda: dataclasses.replace(plan, stages=no_mixture), "stage '256': mixture is null, but data.sources has short, long, more"),
        (lambda: Data(validation=validation), "train is None and sources are none; give one of them"),
        (lambda: Data(train="x", sources=one, validation=validation), "train is 'x' and sources are a; give one of them"),
        (lambda: Data(sources=one, validation="f/validation", prepare="stdlib"), "data.train is None"),
        (lambda: Data(train="x", validation=validation, workers=-1), "data.workers is -1"),
        (lambda: Data(train="x", validation=validation, window_tokens=0), "data.window_tokens is 0"),
        (lambda: Source(prefix="x", at_least=-1), "source 'x'.at_least is -1"),
        (lambda: Source(prefix="x", at_least=8, below=8), "source 'x': below is 8; it must be more than at_least, 8"),
    ):
        with pytest.raises(ValueError) as refused:
            make()
        assert says in str(refused.value)


def test_sources_that_are_not_there_are_refused_before_a_model_is_built(corpus: Path, tmp_path: Path) -> None:
    """Through the command: exit status 2, one line that names the source, and nothing written."""
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(as_yaml(mixed_plan(corpus)))
    for setting, says in (
        ("data.sources.long.at_least=10000000", "source 'long': "),
        (f"data.sources.more.prefix={tmp_path / 'none'}", "source 'more': "),
    ):
        done = run("train", recipe, "--to", tmp_path / "run", "--set", setting)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert says in done.stderr
        assert not (tmp_path / "run").exists()


def test_planned_epochs(corpus: Path) -> None:
    plan = mixed_plan(corpus)
    data = open_data(plan)
    lines = planned_epochs(plan, data.sources)
    # short: 3/4 of 24 rows of 64; of the second stage's 16 rows 3/4 of half the ramp's 8, and 1/4 of the last 3
    tokens = 18 * 64 + 3 * 128 + 3 * 128 // 4
    size = data.sources["short"].token_count
    assert lines[0].startswith(f"source short: {tokens / size:.3g} epochs planned ({tokens:,} tokens of {size:,} in ")
    assert [line.split(":")[0] for line in lines] == ["source short", "source long", "source more"]


def consumption(folder: Path) -> list[dict[str, Any]]:
    """Every step's figures of its data."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "sources", "epochs", "packing_efficiency", "split_documents")
    return [{name: line[name] for name in kept} for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mixed.yaml"
    path.write_text(as_yaml(mixed_plan(corpus)))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 steps: 6 of the first stage, and 8 of the second, whose first 4 are the ramp."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run("train", recipe, "--to", folder)
    assert done.returncode == 0, done.stderr
    assert "source short: " in done.stderr
    return folder


def test_figures_of_the_data(corpus: Path, undisturbed: Path) -> None:
    """Tokens by source add up to what the packing kept; cuts alone fill nothing up; long documents come when their turn does."""
    lines = consumption(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, 15))
    taken, sizes = 0, {name: view.token_count for name, view in open_data(mixed_plan(corpus)).sources.items()}
    for line in lines:
        now = sum(line["sources"].values())
        assert now - taken == round(line["packing_efficiency"] * 256)
        assert line["epochs"] == {name: tokens / sizes[name] for name, tokens in line["sources"].items()}
        assert line["packing_efficiency"] == 1 or line["step"] <= 6
        taken = now
    assert lines[5]["sources"]["long"] == 0 < lines[7]["sources"]["long"]
    assert lines[9]["sources"]["more"] == lines[13]["sources"]["more"] > 0
    assert lines[10]["sources"]["short"] < lines[13]["sources"]["short"]


def test_killed_inside_the_transition_it_goes_on_to_the_last_bit(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL in the ramp, then gone on with another number of workers: every loss, and every source's tokens."""
    kill_at_step(recipe, tmp_path / "run", 9)
    assert len(consumption(tmp_path / "run")) < 14
    done = run("train", recipe, "--to", tmp_path / "run", "--set", "data.workers=0")
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "run") == figures(undisturbed)
    assert consumption(tmp_path / "run") == consumption(undisturbed)


def test_two_ranks_read_the_same(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    done = run("train", recipe, "--to", tmp_path / "run", "--ranks", 2, "--set", "steps=9")
    assert done.returncode == 0, done.stderr
    assert consumption(tmp_path / "run") == consumption(undisturbed)[:9]


def test_changed_data_is_refused_by_name(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Another file under the same prefix, and a plan with other bounds."""
    run_folder = tmp_path / "run"
    shutil.copytree(undisturbed, run_folder)
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(as_yaml(mixed_plan(corpus)))
    done = run("train", recipe, "--to", run_folder, "--set", "data.sources.long.at_least=401")
    assert done.returncode == 2
    assert "data.sources.long.at_least: 400 -> 401" in done.stderr
    record: Record = read_record(checkpoints_in(run_folder / "checkpoints")[-1])
    assert list(record.data_fingerprints) == ["short", "long", "more"]
    assert all(type(mark) is Bookmark for mark in record.progress.sources.values())
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("train", "validation"):
        for suffix in (".bin", ".idx", ".json", ".tokenizer.json"):
            shutil.copy(corpus / f"{name}{suffix}", moved / f"{name}{suffix}")
    plan = mixed_plan(moved)
    (run_folder / "plan.yaml").write_text(as_yaml(plan))
    recipe.write_text(as_yaml(plan))
    for suffix in (".bin", ".idx", ".json", ".tokenizer.json"):
        shutil.copy(corpus / f"train{suffix}", moved / f"validation{suffix}")
    done = run("train", recipe, "--to", run_folder)
    assert done.returncode == 2
    assert f"source 'more': {moved / 'validation'} changed since" in done.stderr
