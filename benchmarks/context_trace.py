"""When exchanges between context ranks begin and end, and what runs meanwhile: a profiler trace of one training step.

    python benchmarks/context_trace.py

The tiny recipe's model (7 lightning layers, 1 softmax) on four gloo ranks with one thread each, one document, so that no rank has more to
do than another; of several steps the one in which threads waited least, since others use the cores too. For each exchange of states and
each hop of the ring: when it was begun, when awaited, which compute ran between, and how much of it lay under compute. gloo on a CPU
shows the order of the schedule, not the speed of a network: ranks share cores, and one that comes late makes the others wait. Writes
benchmarks/results/context_trace.{json,md,png} and rank 0's Chrome trace without operators below 0.1 ms, context_trace.json.gz.
"""

import gzip
import json
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import machine
from timeline import draw
from torch import nn
from torch.autograd.profiler import record_function
from trace_reader import MODULE, STEP, Trace, slim

from minimax_train.engine.session import session
from minimax_train.engine.trainer import Trainer
from minimax_train.model.row import Row
from minimax_train.recipe import load_plan
from parallel.collectives import wait_for_all
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place

RANKS, TOKENS, WARM_UP, STEPS = 4, 8192, 2, 3
EXCHANGES = ("states", "states back", "ring keys and values", "ring gradients")


@contextmanager
def annotated(decoder: nn.Module) -> Iterator[None]:
    """Every mixer's projections and norms, every layer's norms and experts, embedding and head are named in the trace."""
    named: dict[str, nn.Module] = {name: getattr(decoder, name) for name in ("embedding", "norm", "head")}
    for layer, block in decoder.blocks.items():  # type: ignore[union-attr,operator]
        parts = dict(block.attention.named_children()) | {n: m for n, m in block.named_children() if n != "attention"}
        named |= {f"{layer} {name}": module for name, module in parts.items()}
    hooks, opened = [], []

    def enter(_: nn.Module, __: Any, *, name: str) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    for name, module in named.items():
        label = f"{MODULE}layer {name}" if name[0].isdigit() else f"{MODULE}model {name}"
        hooks.append(module.register_forward_pre_hook(lambda m, x, name=label: enter(m, x, name=name)))
        hooks.append(module.register_forward_hook(leave))
    yield
    for hook in hooks:
        hook.remove()


def on_rank(place: Place, folder: Path) -> None:
    """Writes a trace of each of this rank's steps into the folder."""
    torch.set_num_threads(1)
    layout = Layout(context=place.size)
    with session(layout=layout, place=place) as joined:
        trainer = Trainer(load_plan("recipes.tiny:stdlib"), joined)
        ids = torch.randint(0, 256, (TOKENS + 1,), generator=torch.Generator().manual_seed(0))
        row = Row.of_documents([ids[:-1]]).with_labels(ids[1:]).cut(layout, place.rank)
        with annotated(trainer.decoder):
            for _ in range(WARM_UP):
                trainer.step([row], 1e-3)
            for step in range(STEPS):
                wait_for_all(joined.groups.world)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, record_function(STEP):
                    trainer.step([row], 1e-3)
                profile.export_chrome_trace(str(folder / f"{step}-{place.rank}.json"))


def calmest(folder: Path) -> tuple[int, list[Trace]]:
    """The step in which the ranks' threads waited least, and its traces."""
    steps = {step: [Trace(folder / f"{step}-{rank}.json") for rank in range(RANKS)] for step in range(STEPS)}
    return min(steps.items(), key=lambda item: sum(wait.end - wait.start for trace in item[1] for wait in trace.waits))


def totals(traces: Sequence[Trace], names: Sequence[str] = EXCHANGES) -> list[dict[str, Any]]:
    """Over all ranks and layers, for each kind of exchange (of `names`, in their order) and direction: milliseconds, see the table."""
    groups: dict[tuple[bool, str], Counter[str]] = defaultdict(Counter)
    for several in zip(*(trace.exchanges for trace in traces), strict=True):  # one exchange, as each rank saw it
        if len({(e.name, e.layer, e.backward) for e in several}) > 1:
            raise ValueError(f"ranks' exchanges differ: {several}; all ranks begin the same ones in one order")
        came = max(trace.clock + e.begun for trace, e in zip(traces, several, strict=True))  # the last rank
        for trace, e in zip(traces, several, strict=True):
            start = min(max(came - trace.clock, e.begun), e.end)
            figures = {"number": 1, "lasted": e.lasted, "waited": e.waited, "transfer": e.end - start}
            figures |= {"transfer_waited": trace.waited(start, e.end), "compute": sum(e.between.values())}
            groups[e.backward, e.name].update(figures)
    order = sorted(groups.items(), key=lambda item: (item[0][0], names.index(item[0][1])))
    return [{"name": name, "backward": backward, **sums} for (backward, name), sums in order]


def table(traces: Sequence[Trace], facts: dict[str, Any]) -> str:
    lines = [
        f"# Exchanges of one training step on {RANKS} context ranks",
        "",
        f"The tiny recipe's model, {TOKENS:,} tokens in one document, fp32, forward and backward; of {STEPS} steps the one "
        f"in which the ranks waited least. Milliseconds from its beginning. {facts['processor']}, {facts['cores']} cores "
        f"that others used too (load {facts['load']:.1f}), torch {facts['torch']}, gloo, {facts['date']}.",
        "",
        "This shows the order of the schedule, not the speed of a network: four ranks share a CPU, an exchange lasts until the slowest of "
        "them has come to it, and most of that wait is the others' compute. The order is the same on a GPU; the shares are not.",
        "",
        "An exchange lasts from its begin to the end of gloo's work; waited is the part in which the thread stood still, for it or for "
        "another, and the rest lay under compute. Its transfer lasts from when the last rank began it. The second step of an exchange of "
        "states (states back) is awaited where it is begun: nothing can run meanwhile.",
        "",
        "## All ranks, all layers",
        "",
        "| exchange | pass | number | lasted, ms | waited, ms | under compute | transfer, ms | of it under compute | compute between begin "
        "and finish, ms |",
        "|---" * 9 + "|",
    ]
    for one in totals(traces):
        lines.append(
            f"| {one['name']} | {'backward' if one['backward'] else 'forward'} | {one['number']} | {one['lasted']:.1f} | "
            f"{one['waited']:.1f} | {1 - one['waited'] / one['lasted']:.0%} | {one['transfer']:.1f} | "
            f"{1 - one['transfer_waited'] / one['transfer']:.0%} | {one['compute']:.1f} |"
        )
    lines += [
        "",
        "## Rank 0, one by one",
        "",
        "| layer | pass | exchange | begun | awaited | there | lasted | waited | ran between begin and finish (ms) |",
        "|---" * 9 + "|",
    ]
    for e in traces[0].exchanges:
        ran = ", ".join(f"{name} {ms:.2f}" for name, ms in list(e.between.items())[:4] if ms >= 0.02) or "nothing"
        what = f"{e.name}, hop {e.hop}" if e.name.startswith("ring") else e.name
        lines.append(
            f"| {e.layer} | {'backward' if e.backward else 'forward'} | {what} | {e.begun:.2f} | {e.awaited:.2f} | {e.finished:.2f} | "
            f"{e.lasted:.2f} | {e.waited:.2f} | {ran} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    load = os.getloadavg()[0]
    results = Path(__file__).parent / "results"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_ranks(RANKS, on_rank, folder)
        step, traces = calmest(folder)
        first = slim(folder / f"{step}-0.json", shortest=0.1)
    facts = machine() | {"load": load}
    text = table(traces, facts)
    print(text)
    (results / "context_trace.md").write_text(text)
    record = {"machine": facts, "totals": totals(traces), "exchanges": [vars(e) for e in traces[0].exchanges]}
    (results / "context_trace.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / "context_trace.json.gz").write_bytes(gzip.compress(first, mtime=0))
    (results / "context_trace.png").write_bytes(draw(traces[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
