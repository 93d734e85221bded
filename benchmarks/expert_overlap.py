"""Expert parallelism: how much of the exchange the schedule can hide, whether real ranks keep that order, and bytes against the formula.

    python benchmarks/expert_overlap.py [--quick]

1. The order of exchanges and products is recorded from parallel/experts.py and played on a GPU's streams (expert_schedule.py), for 1 to 8
   token groups and exchanges that last 0.25 to 1.5 of the compute; exit 1 where less than 0.9 (1 - 1 / groups) is hidden while the exchange
   is no longer than the compute.
2. Profiler traces on four gloo ranks (expert 4; expert 2 x expert tensor 2): what was computed between begin and finish of each exchange;
   exit 1 where a rank's order is not the recorded one.
3. Bytes that 2 and 4 gloo ranks count, layer and rank, against the formulas of docs/parallelism.md; exit 1 where one differs.

`--quick`: without the traces, nothing written. Writes benchmarks/results/expert_overlap.{json,md,png}.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from context_trace import totals
from expert_draw import draw
from expert_ranks import STEPS, Case, Counted, count, events_in, trace_on_rank
from expert_schedule import COMPUTE, Costs, Played, play, record
from expert_words import page
from machine import machine
from trace_reader import Trace

from parallel.testing import run_ranks

GROUPS, TRACED_GROUPS = (1, 2, 4, 8), (1, 2, 4)
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
PLAYED = ((4, 1, 0.0), (1, 2, 1.0), (2, 2, 0.7), (2, 2, 0.5), (2, 2, 0.3), (2, 2, 0.1))
"""Expert ranks, expert-tensor ranks, the latter's share of the exchange's time."""
MARK = 0.9
COUNTED = ((2, 1), (4, 1), (1, 2), (2, 2))
TRACED = ((4, 1), (2, 2))
WAYS = ("forward", "backward")
NAMES = tuple(name + way for name in ("dispatch", "gather", "scatter", "combine") for way in ("", " gradients"))


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """What one pass hides, played."""

    expert: int
    slices: int
    share: float
    groups: int
    way: str
    ratio: float
    hidden: float

    @property
    def bound(self) -> float:
        return 1 - 1 / self.groups

    @property
    def marked(self) -> bool:
        """Whether the mark is asked for."""
        return self.ratio <= 1

    @property
    def good(self) -> bool:
        return not self.marked or self.hidden >= MARK * self.bound - 1e-9


def hidden() -> list[Hidden]:
    """Every layout, number of groups, pass and ratio."""
    found = []
    for expert, slices, share in PLAYED:
        for groups in GROUPS:
            for way, events in zip(WAYS, record(expert, slices, groups), strict=True):
                for ratio in RATIOS:
                    share_hidden = play(events, Costs(exchange=ratio, slices=share)).hidden
                    found.append(
                        Hidden(expert=expert, slices=slices, share=share, groups=groups, way=way, ratio=ratio, hidden=share_hidden)
                    )
    return found


def example(groups: int = 4) -> list[Played]:
    """Forward and backward of expert 2 x expert tensor 2, to look at: as much exchange as compute in the forward, half in the backward."""
    costs = Costs(exchange=1.0, slices=0.5), Costs(exchange=0.5, slices=0.5)
    return [play(events, cost) for events, cost in zip(record(2, 2, groups), costs, strict=True)]


def counted() -> list[Counted]:
    return count(
        [
            Case(expert=expert, slices=slices, groups=groups, tokens=tokens, hidden=16, width=32, routing=routing)
            for expert, slices in COUNTED
            for groups in TRACED_GROUPS
            for routing, tokens in (("even", 96), ("random", 101))
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The traces of one case: of several passes the one in which the ranks waited least."""

    case: Case
    traces: tuple[Trace, ...]

    @property
    def in_order(self) -> bool:
        """Whether every rank of every exchange did what was recorded, in that order."""
        forward, backward = record(self.case.expert, self.case.slices, self.case.groups)
        wanted = [replace(event, rows=0, waits=COMPUTE) for event in (*forward, *backward) if event.kind != "join"]
        return all(events_in(trace) == wanted for trace in self.traces)

    def as_dict(self) -> dict[str, Any]:
        exchanges = [vars(e) for e in self.traces[0].exchanges]
        return asdict(self.case) | {"in_order": self.in_order, "totals": totals(self.traces, NAMES), "rank_0": exchanges}


def traced() -> list[Traced]:
    found = []
    for expert, slices in TRACED:
        cases = [Case(expert=expert, slices=slices, groups=groups, tokens=2048, hidden=256, width=256) for groups in TRACED_GROUPS]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run_ranks(expert * slices, trace_on_rank, cases, folder)
            for number, case in enumerate(cases):
                passes = [tuple(Trace(folder / f"{number}-{step}-{rank}.json") for rank in range(case.ranks)) for step in range(STEPS)]
                found.append(Traced(case=case, traces=min(passes, key=_waited)))
    return found


def _waited(traces: Sequence[Trace]) -> float:
    return sum(wait.end - wait.start for trace in traces for wait in trace.waits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no traces, nothing written")
    quick = parser.parse_args().quick
    load = os.getloadavg()[0]
    shares, bytes_, traces = hidden(), counted(), [] if quick else traced()
    facts = machine() | {"load": load}
    text = page(shares, [one.as_dict() for one in traces], bytes_, facts)
    print(text)
    if not quick:
        results = Path(__file__).parent / "results"
        record_ = {
            "machine": facts,
            "hidden": [asdict(one) | {"bound": one.bound, "marked": one.marked} for one in shares],
            "traced": [one.as_dict() for one in traces],
            "bytes": [asdict(one) | {"equal": one.equal} for one in bytes_],
        }
        (results / "expert_overlap.json").write_text(json.dumps(record_, indent=1) + "\n")
        (results / "expert_overlap.md").write_text(text)
        (results / "expert_overlap.png").write_bytes(draw(shares, example(), traces[-1].traces[0]))
    wrong = [f"too little hidden: {one}" for one in shares if not one.good]
    wrong += [f"not as many bytes as by formula: {one}" for one in bytes_ if not one.equal]
    wrong += [f"not in the recorded order: {one.case}" for one in traces if not one.in_order]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
