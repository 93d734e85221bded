"""Why a stage's layout would not do on these machines, and what would."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from minimax_train.model.recompute import Recompute
from minimax_train.plan import Plan
from minimax_train.planner.machine import GIB, Machine
from minimax_train.planner.memory import RankMemory, StageMemory, stage_memory
from parallel.layout import Layout

STRONGER: dict[Recompute, tuple[Recompute, ...]] = {"none": ("selective", "full"), "selective": ("full",), "full": ()}
"""What keeps less, the cheaper first."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One reason, in a line that says what was given and what to change."""

    kind: str
    """ranks, node, uneven or memory."""
    text: str


def refusals(plan: Plan, number: int, ranks: int, machine: Machine, memory: StageMemory | None) -> list[Refusal]:
    """Of the plan's stage `number` on `ranks` of these GPUs; `memory` where the layout fits the ranks (else it is not looked at)."""
    found = [*_of_ranks(plan, number, ranks), *_of_nodes(plan.layout_of(number), ranks, machine), *_uneven(plan, number)]
    if memory is not None and memory.worst.peak > machine.usable:
        found.append(Refusal(kind="memory", text=_too_much(memory.worst, machine) + _instead(plan, number, ranks, machine)))
    return found


def notes(plan: Plan, number: int, machine: Machine) -> list[str]:
    """What is no reason to refuse, but should be known."""
    layout, kinds = plan.layout_of(number), plan.model.layer_kinds
    found = []
    if layout.expert * layout.expert_tensor > machine.per_node:
        nodes = -(-layout.expert * layout.expert_tensor // machine.per_node)
        found.append(f"rows travel to their experts over {nodes} nodes (expert {layout.expert} x expert_tensor {layout.expert_tensor})")
    cut = plan.cut(layout)
    softmax = [sum(kinds[i] == "softmax" for part in cut.held(rank) for i in part) for rank in range(layout.pipeline)]
    if len(set(softmax)) > 1 and cut.warning is None:
        found.append(f"pipeline ranks hold {', '.join(map(str, softmax))} softmax layers; at this length they cost alike")
    return found


def _of_ranks(plan: Plan, number: int, ranks: int) -> Iterator[Refusal]:
    try:
        plan.check_stage_ranks(number, ranks)
    except ValueError as error:
        said = str(error).removeprefix(f"stage {plan.stages[number].name!r}: ")
        yield Refusal(kind="ranks", text=said.replace("ranks were started", "GPUs", 1))


def _of_nodes(layout: Layout, ranks: int, machine: Machine) -> Iterator[Refusal]:
    """Groups that talk within every layer and cannot hide it: tensor, expert_tensor, and key_value's all-to-all."""
    node = min(machine.per_node, ranks)
    for name, size in (
        ("tensor", layout.tensor),
        ("expert_tensor", layout.expert_tensor),
        ("key_value x tensor", layout.key_value * layout.tensor if layout.key_value > 1 else 1),
    ):
        if node % size:
            divisors = ", ".join(str(d) for d in range(1, node + 1) if node % d == 0)
            yield Refusal(
                kind="node",
                text=f"layout.{name} is {size}, so that its groups cross the border of a node of {machine.per_node} GPUs, where each layer "
                f"would wait for the network: use one of {divisors}",
            )


def _uneven(plan: Plan, number: int) -> Iterator[Refusal]:
    layout, kinds = plan.layout_of(number), plan.model.layer_kinds
    cut = plan.cut(layout)
    if cut.warning is not None:
        softmax = [sum(kinds[i] == "softmax" for part in cut.held(rank) for i in part) for rank in range(layout.pipeline)]
        even = [d for d in range(1, min(plan.model.num_layers, 4 * layout.pipeline) + 1) if _is_even(plan, number, d)]
        yield Refusal(
            kind="uneven",
            text=f"layout.pipeline is {layout.pipeline}: the dearest of its ranks costs {cut.imbalance:.2f} times the mean at length "
            f"{cut.length}, and all wait for it (softmax layers of each: {', '.join(map(str, softmax))}): use one of "
            f"{', '.join(map(str, even))}",
        )


def _is_even(plan: Plan, number: int, pipeline: int) -> bool:
    try:
        changed = with_layout(plan, number, replace(plan.layout_of(number), pipeline=pipeline))
        return changed.cut(changed.layout_of(number)).warning is None
    except ValueError:
        return False


def _too_much(rank: RankMemory, machine: Machine) -> str:
    """Where the memory goes."""
    parts = {
        "weights": rank.parameters,
        "gradients": rank.gradients,
        "optimizer": rank.optimizer,
        "activations": rank.activations + rank.states,
        "head": rank.logits,
        "working": rank.working + rank.buffers,
    }
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
    return (
        f"does not fit: pipeline rank {rank.rank} needs {rank.peak / GIB:.1f} GiB of the {machine.usable / GIB:.1f} that {machine.name} "
        f"has for tensors ({listed}; rows in flight: {rank.rows_held})"
    )


def _instead(plan: Plan, number: int, ranks: int, machine: Machine) -> str:
    """The first of the changes, the mildest first, with which it would fit and nothing else is refused."""
    for said, changed in _changes(plan, number):
        try:
            if [*_of_ranks(changed, number, ranks), *_of_nodes(changed.layout_of(number), ranks, machine), *_uneven(changed, number)]:
                continue
            peak = stage_memory(changed, number, ranks).worst.peak
        except ValueError:
            continue
        if peak <= machine.usable:
            return f": {said} would fit ({peak / GIB:.1f} GiB)"
    return f": no single change of recompute, context, tensor, pipeline or expert fits on {ranks} GPUs: combine several, or use more"


def _changes(plan: Plan, number: int) -> Iterator[tuple[str, Plan]]:
    """Recomputation, then more ranks of one kind, then both."""
    layout, stage = plan.layout_of(number), plan.stages[number]
    again = STRONGER[stage.recompute]
    layouts = list[tuple[str, Layout]]()
    for factor in (2, 4, 8):
        for name in ("context", "tensor", "pipeline", "expert", "expert_tensor"):
            try:
                layouts.append(
                    (f"layout.{name}={factor * getattr(layout, name)}", replace(layout, **{name: factor * getattr(layout, name)}))
                )
            except ValueError:
                continue
    for recompute in again:
        yield f"recompute={recompute}", with_layout(plan, number, layout, recompute)
    for recompute in (stage.recompute, *again):
        for said, changed in layouts:
            try:
                both = said if recompute == stage.recompute else f"{said} with recompute={recompute}"
                yield both, with_layout(plan, number, changed, recompute)
            except ValueError:
                continue


def with_layout(plan: Plan, number: int, layout: Layout, recompute: Recompute | None = None) -> Plan:
    """The plan with another layout (and recompute) in one stage. ValueError where the model or the rows do not take it."""
    stages = list(plan.stages)
    stages[number] = replace(stages[number], layout=layout, recompute=recompute or stages[number].recompute)
    return replace(plan, stages=tuple(stages))
