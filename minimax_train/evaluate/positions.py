"""Did the context grow? Loss by position in the document, before and after each extension stage.

For a stage of length L after one of length P: the held-out documents longer than P, cut at L, scored by the weights of the end of
the previous stage and of the end of this one, both with this stage's RoPE base. Positions from P on are beyond what was seen before.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from data.dataset import TokenDataset
from minimax_train.checkpoint.commit import replace_text
from minimax_train.checkpoint.shelf import folder_of
from minimax_train.engine.session import Session
from minimax_train.evaluate.logits import load_decoder
from minimax_train.model.decoder import Decoder
from minimax_train.model.row import Row
from minimax_train.plan import Plan, Stage
from minimax_train.train.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Change:
    """Mean loss (nats per token) before and after a stage."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class StagePositions:
    """One extension stage's figures; bins are positions edges[i] up to edges[i+1]."""

    stage: str
    previous_length: int
    length: int
    rope_base: float
    documents: int
    tokens: int
    edges: list[int]
    count: list[int]
    before: list[float]
    after: list[float]
    inside: Change
    """Positions below previous_length."""
    beyond: Change
    """Positions from previous_length on."""


def evaluate_positions(run: Path, session: Session) -> list[StagePositions]:
    """Every extension stage of a finished run; also written to RUN/evaluation/positions.json.

    ValueError where a stage's end has no checkpoint, or no held-out document is longer than the previous length.
    """
    folder = RunFolder(run).require()
    plan = folder.load_plan()
    dataset = TokenDataset.open(plan.data.validation)
    results = [
        _stage(plan, index, folder, dataset, session)
        for index in range(1, len(plan.stages))
        if plan.stages[index].length > plan.stages[index - 1].length
    ]
    folder.positions.parent.mkdir(exist_ok=True)
    replace_text(folder.positions, json.dumps({"stages": [asdict(result) for result in results]}, indent=1))
    return results


def _stage(plan: Plan, index: int, folder: RunFolder, dataset: TokenDataset, session: Session) -> StagePositions:
    previous, stage = plan.stages[index - 1], plan.stages[index]
    rows = _long_documents(dataset, previous, stage)
    ends = [sum(s.steps for s in plan.stages[: i + 1]) for i in (index - 1, index)]
    losses = []
    for end in ends:
        checkpoint = folder_of(folder.checkpoints, end)
        if not checkpoint.is_dir():
            raise ValueError(f"{checkpoint} is missing: stage {stage.name!r} has not been run to its end")
        decoder, _ = load_decoder(checkpoint, session)
        losses.append(_losses(decoder, rows, stage.rope_base, session.device))
    positions = torch.cat([row.positions for row in rows])
    edges = [0, *(2**n for n in range(8, 40) if 2**n < stage.length), stage.length]
    inside = positions < previous.length
    means = [[float(loss[(positions >= low) & (positions < high)].mean()) for low, high in pairwise(edges)] for loss in losses]
    return StagePositions(
        stage=stage.name,
        previous_length=previous.length,
        length=stage.length,
        rope_base=stage.rope_base,
        documents=len(rows),
        tokens=len(positions),
        edges=edges,
        count=[int(((positions >= low) & (positions < high)).sum()) for low, high in pairwise(edges)],
        before=means[0],
        after=means[1],
        inside=Change(before=float(losses[0][inside].mean()), after=float(losses[1][inside].mean())),
        beyond=Change(before=float(losses[0][~inside].mean()), after=float(losses[1][~inside].mean())),
    )


def _long_documents(dataset: TokenDataset, previous: Stage, stage: Stage) -> list[Row]:
    """Each held-out document longer than the previous length as a row of its own, at most the stage's length."""
    rows = []
    for document in range(dataset.documents):
        tokens = torch.from_numpy(dataset.tokens(document, 0, stage.length + 1))
        if len(tokens) > previous.length + 1:
            rows.append(Row.of_documents([tokens[:-1]]).with_labels(tokens[1:]))
    if not rows:
        raise ValueError(f"{dataset.prefix} has no document longer than {previous.length} tokens to judge stage {stage.name!r} by")
    return rows


@torch.no_grad()
def _losses(decoder: Decoder, rows: list[Row], rope_base: float, device: torch.device) -> Tensor:
    """Loss of every token of every row, fp64 `[total tokens]` on the host."""
    decoder.rope_base = rope_base
    return torch.cat([decoder(row.to(device))[0].double().cpu() for row in rows])


def positions_table(results: list[StagePositions]) -> str:
    """The figures as text, a line a stage and part."""
    if not results:
        return "no stage is longer than the one before it: there is no extension to judge"
    lines = [f"{'stage':8}{'positions':22}{'before':>10}{'after':>10}{'change':>10}   nats per token"]
    for r in results:
        for name, change in ((f"below {r.previous_length:,}", r.inside), (f"{r.previous_length:,} to {r.length:,}", r.beyond)):
            lines.append(f"{r.stage:8}{name:22}{change.before:10.4f}{change.after:10.4f}{change.after - change.before:+10.4f}")
    return "\n".join(lines)
