"""Pipeline parallelism: schedules, validation, bf16, who holds what, refusals. Plain layouts: test_layouts; checkpoints: test_reshard."""

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


@pytest.mark.parametrize(
    ("layout", "rows"),
    [(Layout(pipeline=2), 2), (Layout(pipeline=2, virtual_pipeline=2), 4)],
    ids=["nothing but warm-up and cool-down", "interleaved"],
)
def test_pipelines_side_by_side(corpus: Path, layout: Layout, rows: int) -> None:
    """Pipeline 2, data 2."""
    batches = partial(train_on, steps=STEPS, rows_in_batch=rows)
    ours, alone = run_ranks(4, batches, corpus, layout, {}), run_ranks(1, batches, corpus, Layout(), {})[0]
    same(ours[0], alone)
    same(ours[3], alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, Layout(pipeline=2, virtual_pipeline=4)),
        (4, Layout(pipeline=4, virtual_pipeline=2)),
        (4, Layout(pipeline=2, virtual_pipeline=2, tensor=2)),
        (4, Layout(pipeline=2, virtual_pipeline=2, context=2)),
        (4, Layout(pipeline=2, virtual_pipeline=2, expert=2)),
        (8, Layout(pipeline=8)),
    ],
    ids=str,
)
def test_a_pipeline_of_a_layout_equals_the_layout(corpus: Path, ranks: int, layout: Layout) -> None:
    alone = replace(layout, pipeline=1, virtual_pipeline=1)
    theirs = run_ranks(ranks // layout.pipeline, train, corpus, alone, {}, None, None)[0]
    same(run_ranks(ranks, train, corpus, layout, {}, None, None)[-1], theirs)


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
    layout = Layout(pipeline=2, virtual_pipeline=2)
    cut = little_plan(corpus, model=hybrid(), layout=layout).cut(layout)
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
