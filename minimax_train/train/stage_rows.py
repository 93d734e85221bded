"""A stage's shares and rows, as the data room wants them of a plan."""

from collections.abc import Mapping
from fractions import Fraction

from data.mixture import Shares
from data.sampler import Batching, Bookmark, Sampler
from data.views import View
from minimax_train.plan import Plan
from minimax_train.sources import exact


def stage_shares(plan: Plan, number: int) -> Shares:
    """What stage `number` takes of each of the plan's sources, in their order."""
    stage, base = plan.stages[number], _weights(plan, number)
    mixture = stage.mixture
    if mixture is None:
        return Shares(base, base, base, ramp=Fraction(0), late_from=stage.late_from)
    begin = _weights(plan, number - 1) if mixture.ramp_tokens else base
    return Shares(begin, base, _late(plan, number, base), ramp=Fraction(mixture.ramp_tokens, stage.length), late_from=stage.late_from)


def stage_sampler(
    plan: Plan, number: int, views: Mapping[str, View], bookmarks: Mapping[str, Bookmark], *, rank: int = 0, ranks: int = 1
) -> Sampler:
    """The rows of stage `number` that data-parallel rank `rank` of `ranks` trains on, from the bookmarks on (none: from the beginning)."""
    stage = plan.stages[number]
    return Sampler(
        views,
        stage_shares(plan, number),
        Batching(length=stage.length, packing=stage.packing, window_tokens=plan.data.window_tokens),
        seed=plan.seed,
        bookmarks=bookmarks or {name: Bookmark() for name in views},
        rank=rank,
        ranks=ranks,
        workers=plan.data.workers,
    )


def planned_epochs(plan: Plan, views: Mapping[str, View]) -> list[str]:
    """One line a source: how often the whole run goes through it; what fills rows up is counted as its tokens."""
    tokens = dict.fromkeys(views, Fraction(0))
    steps = plan.total_steps
    for number, stage in enumerate(plan.stages):
        taken = min(stage.steps, steps)
        steps -= taken
        shares = stage_shares(plan, number)
        for source, name in enumerate(views):
            tokens[name] += Fraction(shares.total(source, stage.tokens_at(taken) // stage.length), shares.unit) * stage.length
    return [
        f"source {name}: {float(tokens[name] / view.token_count):.3g} epochs planned "
        f"({int(tokens[name]):,} tokens of {view.token_count:,} in {len(view.documents):,} documents)"
        for name, view in views.items()
    ]


def _weights(plan: Plan, number: int) -> list[Fraction]:
    """A stage's own weights, with sum 1."""
    mixture = plan.stages[number].mixture
    if mixture is None:
        return [Fraction(1)]
    weights = [exact(mixture.weights.get(name, 0)) for name in plan.data.by_name]
    return [weight / sum(weights) for weight in weights]


def _late(plan: Plan, number: int, base: list[Fraction]) -> list[Fraction]:
    """Shares at the stage's end: of `late` what it says, of the others what they have among themselves, of the rest."""
    mixture = plan.stages[number].mixture
    if mixture is None or not mixture.late:
        return base
    late = [exact(mixture.late[name]) if name in mixture.late else None for name in plan.data.by_name]
    rest = 1 - sum(share for share in late if share is not None)
    others = sum(weight for weight, share in zip(base, late, strict=True) if share is None)
    return [weight * rest / others if share is None and rest else share or Fraction(0) for weight, share in zip(base, late, strict=True)]
