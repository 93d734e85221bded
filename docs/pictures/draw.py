"""Draws the pictures of docs/parallelism.md from the code they explain.

    python docs/pictures/draw.py

Four context ranks, a row of three documents; who sends what is asked of the exchanges themselves.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from parallel.collectives import Pending
from parallel.exchange import Exchange, make_exchange
from parallel.pieces import Pieces, cut_row
from parallel.ring_plan import plan_ring
from parallel.states import Flow, state_flow

RANKS, BOUNDS = 4, (0, 11, 40, 64)
HEADS, SIZE = 4, 4
SLOPES = torch.tensor([20.0, 15.0, 14.0, 0.01])  # over a piece of 8 tokens one head in four remembers
RANK_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#C44500")
DOCUMENT_COLOURS = ("#9fb3c8", "#d9e2ec", "#bcccdc")
INK, SOFT = "#1f2933", "#52606d"
HERE = Path(__file__).parent


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def text(axes: Axes, x: float, y: float, words: str, size: float = 10, **style: Any) -> None:
    axes.text(x, y, words, fontsize=size, **{"color": INK, "ha": "center", "va": "center", **style})


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, words: str = "") -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1.5))
    text(axes, x + width / 2, y + height / 2, words, color="white" if colour in RANK_COLOURS else INK)


def draw_layout(pieces: Pieces) -> Figure:
    """The row, its documents, its pieces, and what each rank holds."""
    figure, axes = sheet(9.6, 4.3)
    left, unit = 1.5, 7.8 / pieces.tokens
    for number, (start, stop) in enumerate(pairwise(pieces.bounds)):
        box(axes, left + start * unit, 3.5, (stop - start) * unit, 0.45, DOCUMENT_COLOURS[number], f"document {number}")
    text(axes, 0.7, 3.72, "the row", color=SOFT)
    for piece, owner in enumerate(pieces.owners):
        box(axes, left + piece * pieces.length * unit, 2.85, pieces.length * unit, 0.45, RANK_COLOURS[owner], f"piece {piece}")
    text(axes, 0.7, 3.07, f"{len(pieces.owners)} pieces", color=SOFT)
    for rank in range(pieces.ranks):
        y = 2.05 - 0.55 * rank
        text(axes, 0.7, y + 0.2, f"rank {rank}", color=RANK_COLOURS[rank], weight="bold")
        for piece in pieces.held(rank):
            box(axes, left + piece * pieces.length * unit, y, pieces.length * unit, 0.4, RANK_COLOURS[rank])
        local = pieces.local(rank).bounds
        at = {run.start: run.offset for run in pieces.runs(rank)}
        for run in pieces.runs(rank):
            ends = [b - at[run.start] + run.start for b in local if run.offset <= b <= run.offset + run.stop - run.start]
            for start, stop in pairwise(ends):
                axes.plot([left + (start + 0.6) * unit, left + (stop - 0.6) * unit], [y + 0.2] * 2, color="white", linewidth=2)
    closing = "white lines: the documents a rank sees in its own tokens; each starts from a state that another rank may send"
    text(axes, left, 0.12, closing, 9, ha="left", color=SOFT)
    return figure


class Recorder:
    """Stands for a Channel: notes how many numbers go to whom, and delivers zeros."""

    def __init__(self, rank: int, sent: dict[str, list[list[float]]]) -> None:
        self.rank, self.size, self.sent = rank, RANKS, sent

    def _note(self, name: str, numbers: list[int]) -> None:
        table = self.sent.setdefault(name, [[0.0] * RANKS for _ in range(RANKS)])
        for to, count in enumerate(numbers):
            table[self.rank][to] = count / (HEADS * SIZE * SIZE) if to != self.rank else 0.0

    def begin_all_gather(self, x: Tensor, name: str) -> Pending:
        self._note(name, [x.numel()] * RANKS)
        return Pending(x.new_zeros((RANKS, *x.shape)), x, None, late=False)

    def begin_all_to_all(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        self._note(name, [rows * SIZE for rows in send])
        return Pending(x.new_zeros((sum(receive), *x.shape[1:])), x, None, late=False)


def states_sent(exchange: Exchange, flow: Flow) -> dict[str, list[list[float]]]:
    """Step -> states sent from rank to rank."""
    sent: dict[str, list[list[float]]] = {}
    for rank in range(RANKS):
        channel: Any = Recorder(rank, sent)
        states = torch.zeros(2, HEADS, SIZE, SIZE)
        exchange.finish(exchange.begin(states, flow, channel), states, flow, channel)
    return sent


def draw_steps(steps: list[tuple[str, list[list[float]]]], unit: str, closing: str) -> Figure:
    """Ranks before and after each step, an arrow as thick as what is sent."""
    figure, axes = sheet(9.6, 1.0 + 1.75 * len(steps))
    top = 0.55 + 1.75 * len(steps)
    xs = [2.9 + 1.75 * rank for rank in range(RANKS)]
    for level in range(len(steps) + 1):
        for rank, x in enumerate(xs):
            corner, shape = (x - 0.5, top - 1.75 * level - 0.17), "round,pad=0,rounding_size=0.08"
            axes.add_patch(FancyBboxPatch(corner, 1.0, 0.34, boxstyle=shape, facecolor=RANK_COLOURS[rank], edgecolor="none"))
            text(axes, x, top - 1.75 * level, f"rank {rank}", color="white")
    for level, (words, table) in enumerate(steps):
        y = top - 1.75 * level
        text(axes, 0.15, y - 0.87, words, 9.5, ha="left", linespacing=1.5)
        for source, row in enumerate(table):
            for target, amount in enumerate(row):
                if amount:
                    head = "-|>,head_length=5,head_width=2.5"
                    style = {"linewidth": 0.6 + 1.6 * amount, "color": RANK_COLOURS[source], "alpha": 0.85}
                    axes.add_patch(FancyArrowPatch((xs[source], y - 0.2), (xs[target], y - 1.55), arrowstyle=head, **style))
        total = sum(map(sum, table))
        text(axes, 9.45, y - 0.87, f"{total:.3g} {unit}", 9.5, ha="right", color=SOFT)
    text(axes, 0.15, 0.18, closing, 9, ha="left", color=SOFT)
    return figure


def draw_ring(pieces: Pieces) -> Figure:
    """Which rows of keys and values travel at each hop."""
    plans = [plan_ring(pieces, rank) for rank in range(RANKS)]
    steps = []
    for number, hop in enumerate(plans[0].hops):
        table = [[0.0] * RANKS for _ in range(RANKS)]
        for rank, plan in enumerate(plans):
            table[rank][(rank + hop.distance) % RANKS] = plan.hops[number].sent / pieces.length
        steps.append((f"hop {hop.distance}: keys and values\nto rank + {hop.distance}", table))
    return draw_steps(steps, "pieces", "Width: rows sent, in pieces. A rank sends what the other's queries may look at, and nothing else.")


def main() -> None:
    pieces = cut_row(BOUNDS, RANKS)
    flow = state_flow(pieces)
    pictures = {"layout": draw_layout(pieces), "ring": draw_ring(pieces)}
    first = {"gather": "all-gather:\nevery state to every rank", "transpose": "all-to-all:\na quarter of the rows\nof all states to each",
             "pruned": "all-to-all:\nthe state to the next piece,\nrows of slow heads to all"}  # fmt: skip
    for kind, words in first.items():
        sent = states_sent(make_exchange(kind, SLOPES, SLOPES.tolist(), pieces.length, RANKS, torch.float32), flow)
        names = {"states": words, "states back": "each scans its rows over\nthe pieces; results go back"}
        steps = [(names[name], table) for name, table in sent.items()]
        closing = f"The row above, one head in {HEADS} slow. Width: states sent from rank to rank (a state is heads x D x D numbers)."
        pictures[kind] = draw_steps(steps, "states", closing)
    for name, figure in pictures.items():
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "minimax-train"  # the same bytes at every run
    main()
