"""Pipeline parallelism changes nothing: losses, every gradient, their norm, auxiliary loss, optimizer steps, checkpoints, validation."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import TokenDataset
from minimax_train.engine.session import session
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import STEPS, Outcome, hybrid, same, train, train_on
from tests.support import little_model, little_plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after STEPS steps, under the number of ranks that wrote them."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def one_rank(corpus: Path, saved: Path) -> Outcome:
    outcome: Outcome = run_ranks(1, train, corpus, Layout(), {}, None, saved / "1")[0]
    return outcome


@pytest.fixture(scope="module")
def two_ranks(corpus: Path, saved: Path) -> list[Outcome]:
    return run_ranks(2, train, corpus, Layout(pipeline=2), {}, None, saved / "2")


def test_two_stages_equal_one(one_rank: Outcome, two_ranks: list[Outcome]) -> None:
    assert one_rank.reports[0].grad_norm > 0.1
    for ours in two_ranks:
        same(ours, one_rank)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=4),
        Layout(pipeline=2, tensor=2),
        Layout(pipeline=2, context=2),
        Layout(pipeline=2, virtual_pipeline=2),
        Layout(pipeline=2, expert=2),
    ],
    ids=["pipeline4", "tensor2", "context2", "interleaved data2", "expert2 data2"],
)
def test_four_ranks_equal_one(corpus: Path, one_rank: Outcome, layout: Layout) -> None:
    outcomes = run_ranks(4, train, corpus, layout, {}, None, None)
    same(outcomes[0], one_rank)
    same(outcomes[3], one_rank)


def test_more_stages_than_rows(corpus: Path, one_rank: Outcome) -> None:
    """Pipeline 2, data 2 with one row each: nothing but warm-up and cool-down."""
    two_rows = partial(train_on, steps=STEPS, rows_in_batch=2)
    ours, alone = run_ranks(4, two_rows, corpus, Layout(pipeline=2), {})[0], run_ranks(1, two_rows, corpus, Layout(), {})[0]
    same(ours, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, Layout(pipeline=2, virtual_pipeline=2)),
        (4, Layout(pipeline=2, virtual_pipeline=4)),
        (4, Layout(pipeline=4, virtual_pipeline=2)),
        (4, Layout(pipeline=2, virtual_pipeline=2, tensor=2)),
        (4, Layout(pipeline=2, virtual_pipeline=2, context=2)),
        (4, Layout(pipeline=2, virtual_pipeline=2, expert=2)),
        (8, Layout(pipeline=2, tensor=2, context=2)),
        (8, Layout(pipeline=2, tensor=2, expert=2, expert_tensor=2)),
        (8, Layout(pipeline=8)),
    ],
    ids=str,
)
def test_a_pipeline_of_a_layout_equals_the_layout(corpus: Path, ranks: int, layout: Layout) -> None:
    alone = replace(layout, pipeline=1, virtual_pipeline=1)
    theirs = run_ranks(ranks // layout.pipeline, train, corpus, alone, {}, None, None)[0]
    same(run_ranks(ranks, train, corpus, layout, {}, None, None)[-1], theirs)


@pytest.mark.parametrize(
    ("writer", "layout", "ranks"), [("2", Layout(), 1), ("1", Layout(pipeline=2), 2), ("2", Layout(pipeline=2, virtual_pipeline=2), 2)]
)
def test_checkpoint_of_another_layout(
    corpus: Path, saved: Path, one_rank: Outcome, two_ranks: list[Outcome], writer: str, layout: Layout, ranks: int
) -> None:
    """Weights and moments come back to the bit, and the next step is the one that the layout which saved them takes."""
    wrote = {"1": one_rank, "2": two_ranks[0]}[writer]
    ours = run_ranks(ranks, train, corpus, layout, {}, saved / writer, None)[0]
    for kind, tensors in wrote.state.items():
        assert ours.loaded[kind].keys() == tensors.keys()
        assert all(torch.equal(ours.loaded[kind][name], tensor) for name, tensor in tensors.items()), kind
    own = Layout() if writer == "1" else Layout(pipeline=2)
    same(ours, run_ranks(int(writer), train, corpus, own, {}, saved / writer, None)[0])


def test_bf16_follows_one_rank(corpus: Path) -> None:
    changes = {"precision": "bf16"}
    one: Outcome = run_ranks(1, train, corpus, Layout(), changes, None, None)[0]
    two: Outcome = run_ranks(2, train, corpus, Layout(pipeline=2), changes, None, None)[0]
    assert [r.loss for r in two.reports] == pytest.approx([r.loss for r in one.reports], rel=1e-3)
    assert [r.grad_norm for r in two.reports] == pytest.approx([r.grad_norm for r in one.reports], rel=2e-2)


def scores(place: Place, corpus: Path, layout: Layout) -> list[Any]:
    """Of held-out rows of several lengths, before and after a step; and of one row."""
    torch.set_num_threads(1)
    plan = little_plan(corpus, model=hybrid(), layout=layout)
    with session(layout=layout, place=place) as joined:
        from minimax_train.engine.trainer import Trainer
        from minimax_train.train.rows import to_row
        from minimax_train.train.validate import score, validation_rows

        trainer = Trainer(plan, joined, bucket_size=1000)
        dataset = TokenDataset.open(plan.data.validation)
        rows = sorted(validation_rows(dataset, 256, 900), key=lambda row: len(row.tokens))[:5]
        rows.append(validation_rows(dataset, 97, 1)[0])
        assert len(rows) > 2
        assert len({len(row.tokens) for row in rows}) > 1
        found = [score(trainer, rows)]
        trainer.step([to_row(row, joined) for row in validation_rows(dataset, 64, 8 * 64)[:2] if len(row.tokens) == 64] * 2, 1e-2)
        return [*found, score(trainer, rows), score(trainer, rows[:1])]


@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, Layout(pipeline=2)), (4, Layout(pipeline=2, expert=2)), (2, Layout(pipeline=2, virtual_pipeline=2))], ids=str
)
def test_validation_scores_are_the_same(corpus: Path, ranks: int, layout: Layout) -> None:
    """Rows of several lengths, an odd number of them, and fewer than ranks."""
    alone = run_ranks(1, scores, corpus, Layout())[0]
    assert alone[1].loss < alone[0].loss
    for found in run_ranks(ranks, scores, corpus, layout):
        for ours, theirs in zip(found, alone, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert (ours.predicted_tokens, ours.squares) == (theirs.predicted_tokens, theirs.squares)
            assert (ours.routing.share, ours.routing.dropped) == (theirs.routing.share, [0.0] * 8)
            assert ours.routing.entropy == pytest.approx(theirs.routing.entropy, rel=1e-6)


def stages(place: Place, corpus: Path, layout: Layout) -> tuple[list[list[str]], int, int]:
    """(names of the parameters of each chunk, the rank's part of the pipeline, numbers in them)."""
    plan = little_plan(corpus, model=hybrid(), layout=layout)
    with session(layout=layout, place=place) as joined:
        from minimax_train.engine.trainer import Trainer

        trainer = Trainer(plan, joined)
        names = [[name for name, _ in decoder.named_parameters()] for decoder in trainer.decoders]
        return names, joined.groups.pipeline.rank(), sum(p.numel() for p in trainer.decoder.parameters())


def test_every_parameter_is_on_one_rank(corpus: Path) -> None:
    """The first chunk has the embedding, the last one norm and head; between them no rank holds more than its layers."""
    from minimax_train.model.count import count_parameters

    found = run_ranks(2, stages, corpus, Layout(pipeline=2, virtual_pipeline=2))
    cut = little_plan(corpus, model=hybrid(), layout=Layout(pipeline=2, virtual_pipeline=2)).cut
    for names, rank, _ in found:
        for chunk, layers in zip(names, cut.held(rank), strict=True):
            assert {int(name.split(".")[1]) for name in chunk if name.startswith("blocks.")} == set(layers)
    assert "embedding.weight" in found[0][0][0]
    assert {"norm.weight", "head.weight"} <= set(found[1][0][1])
    assert sum(numbers for *_, numbers in found) == count_parameters(hybrid()).total


def test_what_cannot_be_cut_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"layout.pipeline 3 x layout.virtual_pipeline 2 = 6 chunks, but model.num_layers is 4"):
        little_plan(corpus, layout=Layout(pipeline=3, virtual_pipeline=2))
    with pytest.raises(ValueError, match=r"layout.virtual_pipeline is 2, layout.pipeline 1"):
        Layout(virtual_pipeline=2)
    plan = little_plan(corpus, model=little_model(num_layers=8), layout=Layout(pipeline=4, virtual_pipeline=2))
    with pytest.raises(ValueError, match=r"stage '256': 2 rows in a batch for each of 1 data-parallel ranks, not a multiple of"):
        plan.check_ranks(4)
    little_plan(corpus, layout=Layout(pipeline=4)).check_ranks(4)
