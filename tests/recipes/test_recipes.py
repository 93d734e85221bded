"""Every recipe, resolved, as it was last reviewed; and the published numbers in them."""

import inspect
from pathlib import Path

import pytest

import recipes.kimi_vl
import recipes.ladder
import recipes.m1
import recipes.text01
import recipes.tiny
from minimax_train.model.count import count_parameters
from minimax_train.plan import Plan
from minimax_train.recipe import as_yaml, load_plan
from minimax_train.train.schedule import learning_rate
from recipes import kimi_vl, m1, text01
from recipes.text01 import B, K, M

GOLDEN = Path(__file__).parent / "golden"
MODULES = (recipes.kimi_vl, recipes.ladder, recipes.m1, recipes.text01, recipes.tiny)
NAMES = [
    f"{module.__name__}:{name}"
    for module in MODULES
    for name, made in inspect.getmembers(module, inspect.isfunction)
    if made.__module__ == module.__name__ and not name.startswith("_") and inspect.signature(made).return_annotation is Plan
]
RANKS = {"shape": 2048, "text01": 640, "m1": 640, "hybrid_7b": 64, "kimi_vl": 64, "hybrid_1b": 8, "tiny": 2}


def test_all_are_here() -> None:
    assert len(NAMES) == 13 and "recipes.text01:extend_512k" in NAMES
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == {name.removeprefix("recipes.").replace(":", ".") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_as_reviewed(name: str) -> None:
    """A change of any number shows here. Meant? `minimax-train show RECIPE > tests/recipes/golden/MODULE.FUNCTION.yaml`, and review it."""
    golden = GOLDEN / f"{name.removeprefix('recipes.').replace(':', '.')}.yaml"
    assert as_yaml(load_plan(name)) == golden.read_text()
    assert load_plan(str(golden)) == load_plan(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_layouts_fit_the_ranks_they_are_for(name: str) -> None:
    """Batches divide over the ranks in every stage; a tensor- or expert-tensor-parallel group lies in a node of 8; no pipeline stage costs
    a tenth more than the mean."""
    plan = load_plan(name)
    ranks = next(ranks for part, ranks in RANKS.items() if part in name)
    plan.check_ranks(ranks)
    for number in range(len(plan.stages)):
        layout = plan.layout_of(number)
        assert 8 % layout.tensor == 0 and 8 % layout.expert_tensor == 0
        assert plan.cut(layout).warning is None


def test_pretraining_goes_as_published() -> None:
    """Batches, rates and tokens at the milestones of arXiv 2501.08313 section 4, to a batch."""
    (stage,) = text01.pretrain().stages

    def step_at(tokens: int) -> int:
        """The first step that begins at or behind a token of the stage."""
        return next(part.first + -(-(tokens - part.tokens) // part.batch_tokens) for part in reversed(stage.parts) if part.tokens <= tokens)

    borders = ((0, 16), (68, 16), (70, 32), (789, 32), (791, 64), (4_699, 64), (4_701, 128), (11_399, 128))
    for billions, millions in borders:
        assert stage.batch_at(step_at(billions * B)) == millions * M, billions
    assert learning_rate(stage, 0) == pytest.approx(2e-4 / 500)
    assert learning_rate(stage, 499) == learning_rate(stage, step_at(7_199 * B)) == 2e-4
    assert learning_rate(stage, step_at(7_200 * B)) == learning_rate(stage, step_at(10_399 * B)) == 1.3e-4
    assert learning_rate(stage, step_at(10_900 * B)) == pytest.approx((1.3e-4 * 3e-5) ** 0.5, rel=1e-3)
    assert learning_rate(stage, stage.steps - 1) == pytest.approx(3e-5)
    assert 11_400 * B <= stage.whole_tokens < 11_400 * B + 128 * M
    assert stage.steps == pytest.approx(134_000, rel=0.01)  # derived: some 134 thousand steps, if M is 2^20


def test_the_extension_is_table_6() -> None:
    stages = text01.extend().stages
    assert [(s.length, s.rope_base, s.tokens) for s in stages] == [(128 * K, 5e6, 300 * B), (512 * K, 1e7, 32 * B), (K * K, 1e7, 26 * B)]
    for stage, shares in zip(stages, ((30, 70, 0), (35, 35, 30), (30, 30, 40)), strict=True):
        assert stage.mixture is not None
        assert tuple(stage.mixture.weights.values()) == shares
        assert (stage.mixture.late, stage.mixture.late_fraction) == ({"long_qa": 0.1}, 0.2)
        rows = stage.whole_tokens // stage.length
        assert stage.late_from / rows == pytest.approx(0.8, abs=1e-3)
    alone = [text01.extend_128k(), text01.extend_512k(), text01.extend_1m()]
    assert [plan.stages[0].length for plan in alone] == [stage.length for stage in stages]
    assert all(plan.start.checkpoint for plan in (*alone, text01.extend(), m1.continue_pretrain(), m1.extend(), kimi_vl.extend_text()))


def test_m1_goes_as_published() -> None:
    (stage,) = m1.continue_pretrain().stages
    assert stage.tokens == 7_500 * B
    rates = [learning_rate(stage, int(stage.steps * share)) for share in (0.1, 0.33)]
    assert rates == [8e-5, 8e-5]
    assert learning_rate(stage, int(stage.steps * 0.35)) < 8e-5
    assert learning_rate(stage, stage.steps - 1) == pytest.approx(8e-6)
    lengths = [stage.length for stage in m1.extend().stages]
    assert (lengths[0], lengths[-1], len(lengths)) == (32 * K, K * K, 4)


def test_the_ladder_is_as_large_as_it_says() -> None:
    for name, total, active in (("hybrid_1b", 0.86e9, 0.27e9), ("hybrid_7b", 7.35e9, 1.44e9)):
        counts = count_parameters(load_plan(f"recipes.ladder:{name}").model)
        assert counts.total == pytest.approx(total, rel=0.01)
        assert counts.active == pytest.approx(active, rel=0.02)


def test_minimax_doublings() -> None:
    """The rule of the recipe at the four losses of MiniMax-01's figure 13: 16M, 32M, 64M, 128M tokens, within 2 %."""
    rule = text01.pretrain().critical_batch
    assert rule is not None
    for loss, batch in ((2.22, 16e6), (1.98, 32e6), (1.77, 64e6), (1.58, 128e6)):
        assert rule.tokens(loss) == pytest.approx(batch, rel=0.02)
