"""What `plan` says: every stage's memory and refusals, as a table or as JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from minimax_train.plan import Plan
from minimax_train.planner.machine import GIB, Machine
from minimax_train.planner.memory import StageMemory, stage_memory
from minimax_train.planner.refusals import Refusal, notes, refusals
from minimax_train.planner.sizes import IMBALANCE
from parallel.layout import DEGREES, Layout


@dataclass(frozen=True, kw_only=True)
class StageVerdict:
    """One stage on the machines."""

    name: str
    length: int
    layout: Layout
    recompute: str
    memory: StageMemory | None
    """With IMBALANCE; None where the layout does not fit the number of GPUs."""
    balanced: int | None
    """The worst rank's peak where the experts get equally many rows."""
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A plan on `gpus` of a machine's GPUs."""

    plan: str
    gpus: int
    machine: Machine
    stages: tuple[StageVerdict, ...]

    @property
    def refused(self) -> list[str]:
        """A line for each refusal."""
        return [f"stage {stage.name!r}: {refusal.text}" for stage in self.stages for refusal in stage.refused]

    def table(self) -> str:
        """Memory in GiB: a line for each stage, of its worst pipeline rank."""
        names = ("weights", "gradients", "optimizer", "activations", "states", "head", "working", "buffers", "peak", "balanced")
        lines = [
            f"{self.plan} on {self.gpus} {self.machine.name}: {self.machine.usable / GIB:.1f} GiB of each are for tensors "
            f"({self.machine.memory / GIB:.1f}, less {self.machine.reserve / GIB:.1f} for CUDA, NCCL and gaps); GiB of the worst pipeline "
            f"rank, experts with {IMBALANCE} times their even share (balanced: with that)",
            f"{'stage':10}{'length':>9}  {'layout':28}{'recompute':11}{'rank':>5}" + "".join(f"{name:>12}" for name in names) + "  verdict",
        ]
        for stage in self.stages:
            verdict = "refused: " + ", ".join(dict.fromkeys(r.kind for r in stage.refused)) if stage.refused else "fits"
            head = f"{stage.name:10}{stage.length:>9}  {_degrees(stage.layout, self.gpus):28}{stage.recompute:11}"
            figures = "".join(f"{size / GIB:12.2f}" for size in _figures(stage)) if stage.memory else f"{'-':>12}" * len(names)
            lines.append(f"{head}{stage.memory.worst.rank if stage.memory else '-':>5}{figures}  {verdict}")
        lines += [f"stage {stage.name!r}: the peak is at {stage.memory.worst.moment}" for stage in self.stages if stage.memory]
        lines += [f"stage {stage.name!r}: {note}" for stage in self.stages for note in stage.notes]
        return "\n".join(lines)

    def as_json(self) -> str:
        """Bytes; of every pipeline rank."""
        return json.dumps(
            {
                "plan": self.plan,
                "gpus": self.gpus,
                "gpu": self.machine.name,
                "usable_bytes": self.machine.usable,
                "imbalance": IMBALANCE,
                "fits": not self.refused,
                "stages": [_tree(stage) for stage in self.stages],
            },
            indent=1,
        )


def judge(plan: Plan, gpus: int, machine: Machine) -> Verdict:
    """Every stage of the plan. ValueError where `gpus` is no number of GPUs."""
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}; it must be at least 1")
    return Verdict(
        plan=plan.name, gpus=gpus, machine=machine, stages=tuple(_stage(plan, i, gpus, machine) for i in range(len(plan.stages)))
    )


def _stage(plan: Plan, number: int, gpus: int, machine: Machine) -> StageVerdict:
    stage, layout = plan.stages[number], plan.layout_of(number)
    both = list[StageMemory]()
    if _divides(layout, gpus):
        both = [stage_memory(plan, number, gpus, imbalance=imbalance) for imbalance in (IMBALANCE, 1.0)]
    memory, balanced = both or (None, None)
    return StageVerdict(
        name=stage.name,
        length=stage.length,
        layout=layout,
        recompute=stage.recompute,
        memory=memory,
        balanced=balanced.worst.peak if balanced else None,
        refused=tuple(refusals(plan, number, gpus, machine, memory)),
        notes=tuple(notes(plan, number, machine)),
    )


def _divides(layout: Layout, gpus: int) -> bool:
    try:
        return layout.data(gpus) > 0
    except ValueError:
        return False


def _figures(stage: StageVerdict) -> tuple[int, ...]:
    assert stage.memory is not None and stage.balanced is not None
    m = stage.memory.worst
    parts = (m.parameters, m.gradients, m.optimizer, m.activations, m.states, m.logits, m.working, m.buffers)
    return (*parts, m.peak, stage.balanced)


def _degrees(layout: Layout, gpus: int) -> str:
    """tensor 8 pipeline 10 ... as t8 p10 c4 e32 d2; only degrees above 1."""
    short = {"tensor": "t", "pipeline": "p", "context": "c", "expert": "e", "expert_tensor": "et"}
    said = [f"{short[name]}{getattr(layout, name)}" for name in DEGREES if getattr(layout, name) > 1]
    said += [f"v{layout.virtual_pipeline}"] if layout.virtual_pipeline > 1 else []
    return " ".join([*said, f"d{gpus // layout.dense}" if gpus % layout.dense == 0 else "d?"])


def _tree(stage: StageVerdict) -> dict[str, Any]:
    ranks = [] if stage.memory is None else [_rank(rank) for rank in stage.memory.ranks]
    return {
        "stage": stage.name,
        "length": stage.length,
        "layout": asdict(stage.layout),
        "recompute": stage.recompute,
        "fits": not stage.refused,
        "worst_rank": None if stage.memory is None else stage.memory.worst.rank,
        "peak_bytes": None if stage.memory is None else stage.memory.worst.peak,
        "peak_bytes_balanced": stage.balanced,
        "ranks": ranks,
        "refused": [asdict(refusal) for refusal in stage.refused],
        "notes": list(stage.notes),
    }


def _rank(rank: Any) -> dict[str, Any]:
    tree = {**asdict(rank), "peak": rank.peak}
    return {**tree, "layers": [[part.start, part.stop - 1] for part in rank.layers]}
