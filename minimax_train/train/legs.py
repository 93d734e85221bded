"""A run whose stages have different layouts: leg by leg, each in a session of its own, from the checkpoint that the one before left."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from minimax_train.checkpoint.record import Progress, read_record
from minimax_train.checkpoint.shelf import checkpoints_in
from minimax_train.engine.session import Session
from minimax_train.plan import Plan
from minimax_train.train.folder import RunFolder
from minimax_train.train.pause import Pause
from parallel.layout import Layout
from parallel.pulse import Pulse

OpenSession = Callable[[Layout, int], AbstractContextManager[Session]]
"""A session of a layout, and its number: no two of a process have the same."""


def train_legs(
    plan: Plan,
    run: Path,
    open_session: OpenSession,
    begin: int,
    *,
    only: str | None = None,
    profile: bool = False,
    overrides: Sequence[str] = (),
    pause: Pause | None = None,
    pulse: Pulse | None = None,
) -> Progress:
    """Runs the plan's stages (or only the one named, whose turn it must be), and returns where the run stands. All ranks call it with the
    same `begin`, the stage that is probably next: a wrong guess costs the making of a session."""
    last = len(plan.stages) - 1 if only is None else _number(plan, only)
    guess, number = begin, 0
    while True:
        with open_session(plan.layout_of(guess), number) as session:
            from minimax_train.train.loop import train  # in a session, which keeps what megatron-core says at import to itself

            progress = train(
                plan, run, session, through=last, profile=profile and number == 0, overrides=overrides, pause=pause, pulse=pulse
            )
            here = plan.layout_of(progress.stage) == session.groups.layout
        if progress.stage > last or progress.step >= plan.total_steps or here:  # `here`: it stopped because it was asked to
            return progress
        guess, number = progress.stage, number + 1


def next_stage(run: Path) -> int:
    """The stage that the newest readable checkpoint says is next, unverified; 0 where there is none."""
    for checkpoint in reversed(checkpoints_in(RunFolder(run).checkpoints)):
        try:
            return read_record(checkpoint).progress.stage
        except (OSError, ValueError):
            continue
    return 0


def is_over(plan: Plan, run: Path, only: str | None) -> bool:
    """Whether nothing is left to do: of the stage `only`, or of the whole plan."""
    names = [stage.name for stage in plan.stages] if only is None else [only]
    return all((RunFolder(run).finished / name).exists() for name in names)


def check_turn(plan: Plan, run: Path, only: str) -> None:
    """ValueError where a stage before `only` is not finished yet."""
    wanted, reached = _number(plan, only), next_stage(run)
    if reached < wanted:
        raise ValueError(f"--stage {only}: {run} is still in stage {plan.stages[reached].name!r}: run that first, or leave --stage out")


def _number(plan: Plan, name: str) -> int:
    names = [stage.name for stage in plan.stages]
    if name not in names:
        raise ValueError(f"--stage {name}: the plan has {', '.join(names)}")
    return names.index(name)
