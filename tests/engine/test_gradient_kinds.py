"""Gradient norms by kind of weight: of the right weights, whatever the layout, and together the whole norm. And loss and gradient by source
and length of document."""

import math
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from minimax_train.engine.gradient_kinds import KINDS, kind_of
from minimax_train.engine.session import Session, session
from minimax_train.engine.tally import BUCKETS, FIGURES, LONGEST, Part, Tally, by_length, by_source
from minimax_train.engine.trainer import Trainer
from minimax_train.plan import Data, Mixture, Plan, Source
from minimax_train.train.rows import to_row
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.engine.equality import hybrid, packed
from tests.support import little_plan

MODEL = hybrid(layers=4)


Outcome = tuple[float, dict[str, float], dict[str, Part]]
BOUNDS = ([0, 20, 21, 96], [0, 65, 96], [0, 96], [0, 30, 40, 96])
"""Documents of up to 64 tokens and longer ones."""


def two_sources(corpus: Path, layout: Layout) -> Plan:
    plan = little_plan(corpus)
    sources = {name: Source(prefix=str(plan.data.train)) for name in ("one", "other")}
    data = Data(sources=sources, validation=plan.data.validation)
    stage = replace(plan.stages[0], length=96, batch_tokens=384, tokens=768, mixture=Mixture(weights={"one": 1, "other": 1}))
    return little_plan(corpus, model=MODEL, layout=layout, data=data, stages=(stage,))


def parts_of(sources: list[Part], lengths: dict[str, Part]) -> dict[str, Part]:
    return dict(zip(("one", "other"), sources, strict=True)) | lengths


def same_parts(ours: dict[str, Part], theirs: dict[str, Part], rel: float) -> bool:
    return ours.keys() == theirs.keys() and all(
        astuple(ours[name]) == pytest.approx(astuple(part), rel=rel) for name, part in theirs.items()
    )


def step(place: Place, corpus: Path, layout: Layout) -> Outcome:
    """One step on a global batch of four rows of two sources: the whole norm, the norms by kind, and the parts."""
    with session(layout=layout, place=place) as joined:
        trainer = Trainer(two_sources(corpus, layout), joined)
        data = joined.groups.data
        rows = [to_row(packed(bounds, seed), joined, seed // 2) for seed, bounds in enumerate(BOUNDS)]
        report = trainer.step(rows[data.rank() :: data.size()], 1e-3)
        return report.grad_norm, report.grad_norms, parts_of(report.by_source, report.by_length)


@pytest.fixture(scope="module")
def alone_step(corpus: Path) -> Outcome:
    (outcome,) = run_ranks(1, step, corpus, Layout())
    return outcome


def test_kinds_are_of_the_weights_they_name(corpus: Path, alone: Session) -> None:
    """Against the gradients themselves."""
    trainer = Trainer(little_plan(corpus, model=MODEL), alone)
    rows = [to_row(packed([0, 20, 21, 64], seed), alone) for seed in range(4)]
    trainer.zero_gradients()
    trainer.descend(rows)
    squares = dict.fromkeys(KINDS, 0.0)
    names = {kind: [] for kind in KINDS}  # type: ignore[var-annotated]
    for name, parameter in trainer.decoder.named_parameters():
        squares[kind_of(name, MODEL)] += float(parameter.main_grad.double().square().sum())  # type: ignore[attr-defined]
        names[kind_of(name, MODEL)].append(name)
    assert all("blocks.0.attention" in n or "blocks.1.attention" in n for n in names["lightning_early"])
    assert all("blocks.2.attention" in n for n in names["lightning_late"]) and all("blocks.3.attention" in n for n in names["softmax"])
    assert len(names["experts"]) == 8 and len(names["routers"]) == 4 and len(names["norms"]) == 9
    assert names["embedding"] == ["embedding.weight"] and names["head"] == ["head.weight"]
    report = trainer.step(rows, 0.0)
    assert report.grad_norms == pytest.approx({kind: math.sqrt(square) for kind, square in squares.items()}, rel=1e-5)
    assert min(report.grad_norms.values()) > 0
    assert torch.tensor(list(report.grad_norms.values())).norm().item() == pytest.approx(report.grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, Layout()),
        (2, Layout(pipeline=2)),
        (4, Layout(tensor=2, expert=2)),
        (4, Layout(tensor=2, expert=2, expert_tensor=2)),
        (2, Layout(context=2)),
    ],
    ids=["data 2", "pipeline 2", "tensor 2, expert 2", "and expert tensor 2", "context 2"],
)
def test_any_layout(corpus: Path, alone_step: Outcome, ranks: int, layout: Layout) -> None:
    for norm, kinds, parts in run_ranks(ranks, step, corpus, layout):
        assert same_parts(parts, alone_step[2], rel=1e-4)
        assert norm == pytest.approx(alone_step[0], rel=1e-4)
        assert kinds == pytest.approx(alone_step[1], rel=1e-4)
        assert math.hypot(*kinds.values()) == pytest.approx(norm, rel=1e-5)


def test_parts_of_a_batch(corpus: Path, alone: Session, alone_step: Outcome) -> None:
    """Against a backward pass of its own for every document: losses, and the gradient at each embedded token."""
    plan = two_sources(corpus, Layout())
    trainer = Trainer(replace(plan, auxiliary_loss=0.0), alone)
    rows = [to_row(packed(bounds, seed), alone, seed // 2) for seed, bounds in enumerate(BOUNDS)]
    expected = torch.zeros(2, BUCKETS, FIGURES, dtype=torch.float64)
    (decoder,) = trainer.decoders
    for row in rows:
        x = decoder.embedding(row.tokens).detach().requires_grad_()
        assert row.labels is not None
        losses = decoder.losses(decoder.hidden(x, row)[0], row.labels)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        for begin, end in pairwise(row.pieces.bounds):
            of = slice(begin, end)
            sums = [losses[of].sum(), (row.labels[of] >= 0).sum(), gradient[of].double().square().sum(), end - begin]
            expected[row.source, 0 if end - begin <= LONGEST[0] else 1] += torch.tensor([float(s) for s in sums], dtype=torch.float64)
    report = trainer.step(rows, 0.0)
    lengths, sources = report.by_length, report.by_source
    assert same_parts(parts_of(sources, lengths), parts_of(by_source(expected), by_length(expected)), rel=1e-5)
    assert list(lengths) == ["64", "256"] == list(alone_step[2])[2:]
    assert lengths["64"].loss == pytest.approx(float(expected[:, 0, 0].sum() / expected[:, 0, 1].sum()))
    assert sources[1].gradient == pytest.approx(math.sqrt(float(expected[1, :, 2].sum()) / 192))
    assert lengths["256"].gradient != pytest.approx(lengths["64"].gradient, rel=1e-3)


def test_what_is_no_number_stays_in_its_bucket(alone: Session) -> None:
    row = to_row(packed(BOUNDS[0], 0), alone)
    assert row.labels is not None
    tally, losses = Tally(row), torch.ones(96)
    losses[30] = float("nan")
    tally.losses(losses, row.labels)
    assert tally.sums[0, 0] == 21 and tally.sums[1, 0].isnan()
