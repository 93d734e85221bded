"""Lightning attention over pieces on real gloo ranks, against the fp64 definition on the whole row."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.pieces import Pieces, balanced, zigzag
from parallel.testing import run_ranks
from parallel.world import Place
from tests.parallel.packings import ROWS, TOKENS, drawn

HEADS, SIZE = 5, 8  # five heads: neither they nor their 40 rows divide by 4 or by 16
SLOPES = torch.tensor([0.917, 11.0, 0.05, 4.95e-5, 0.0])
"""Fastest of the model; one that is 0.0 after a piece of 12 tokens; middling; slowest of layer 78; none."""
KINDS = ("gather", "transpose", "pruned")


@dataclass(frozen=True)
class Case:
    bounds: tuple[int, ...]
    kind: str
    owners: str = "zigzag"
    dtype: torch.dtype = torch.float64
    backend: str = "cpu"
    late: bool = False

    def pieces(self, ranks: int) -> Pieces:
        return Pieces(self.bounds, balanced(self.bounds, ranks) if self.owners == "balanced" else zigzag(ranks))


def whole_row(dtype: torch.dtype, tokens: int = TOKENS, heads: int = HEADS, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """qkv `[T, H, 3, D]`, the weights of o in the loss, those of what runs meanwhile."""
    g = torch.Generator().manual_seed(0)
    shapes = ((tokens, heads, 3, size), (tokens, heads, size), (tokens, 3))
    qkv, do, other = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return qkv.to(dtype), do.to(dtype), other.to(dtype)


def on_rank(place: Place, cases: list[Case]) -> list[dict[str, Any]]:
    """What one rank gets for each case."""
    import torch.distributed as dist

    from parallel.collectives import Channel
    from parallel.world import joined

    torch.set_num_threads(1)
    with joined(place, "gloo"):
        assert dist.group.WORLD is not None
        return [one_case(case, Channel(dist.group.WORLD, late=case.late)) for case in cases]


def one_case(case: Case, channel: Any) -> dict[str, Any]:
    from minimax_train.kernels.lightning_steps import LocalDocuments, lightning_steps
    from parallel.exchange import make_exchange
    from parallel.lightning import Passing, lightning_over_pieces
    from parallel.states import state_flow

    pieces, rank = case.pieces(channel.size), channel.rank
    qkv, do, other = (pieces.cut(x, rank).contiguous() for x in whole_row(case.dtype))
    local, flow = pieces.local(rank), state_flow(pieces)
    documents = LocalDocuments(
        cu_seqlens=torch.tensor(local.bounds, dtype=torch.int32), bounds=list(local.bounds), enters=local.enters, leaves=local.leaves
    )
    steps = lightning_steps(SLOPES, documents, backend=case.backend, dtype=case.dtype, head_size=SIZE)
    states = torch.promote_types(case.dtype, torch.float32)
    exchange = make_exchange(case.kind, SLOPES, SLOPES.tolist(), pieces.length, channel.size, states)
    passing = Passing(exchange=exchange, flow=flow, back=flow.mirrored(), channel=channel)
    qkv.requires_grad_()
    order: list[str] = []
    meanwhile = qkv.new_ones(len(qkv), 3).requires_grad_()

    def work() -> Tensor:
        order.append("meanwhile")
        return meanwhile * 2

    o, result = lightning_over_pieces(qkv, steps, passing, work)
    meanwhile.register_hook(lambda _: order.append("meanwhile back"))
    sent = Counter(channel.bytes)
    dqkv, dother = torch.autograd.grad((o * do).sum() + (result * other).sum(), [qkv, meanwhile])
    assert torch.equal(dother, 2 * other)
    return {"o": o.detach(), "dqkv": dqkv, "sent": dict(sent), "all": dict(channel.bytes), "calls": dict(channel.calls), "order": order}


def truth(bounds: tuple[int, ...], qkv: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
    from minimax_train.kernels import silu_lightning_attention

    qkv = qkv.double().requires_grad_()
    o = silu_lightning_attention(qkv[None], SLOPES, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend="definition")[0]
    return o.detach(), torch.autograd.grad((o * do.double()).sum(), qkv)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def check(ranks: int, cases: list[Case], tolerance: float) -> None:
    results = run_ranks(ranks, on_rank, cases)
    for i, case in enumerate(cases):
        pieces = case.pieces(ranks)
        qkv, do, _ = whole_row(case.dtype)
        for name, exact in zip(("o", "dqkv"), truth(case.bounds, qkv, do), strict=True):
            ours = pieces.join([result[i][name] for result in results])
            assert torch.isfinite(ours).all(), (case, name)
            for document, (a, b) in enumerate(zip(case.bounds, case.bounds[1:], strict=False)):
                assert relative(ours[a:b], exact[a:b]) < tolerance, (case, name, document)


@pytest.mark.parametrize("ranks", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_pieces_equal_the_whole(ranks: int) -> None:
    """Every exchange, zigzag and balanced owners, documents beginning anywhere; every document's outputs and gradients by themselves."""
    rows = drawn(25)
    cases = [Case(bounds, kind) for bounds in rows for kind in KINDS]
    cases += [Case(bounds, kind, owners="balanced") for bounds in rows[:12] for kind in KINDS]
    cases += [Case(bounds, "auto", backend="definition") for bounds in list(ROWS.values())[:2]]
    check(ranks, cases, 1e-10)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_in_fp32(ranks: int) -> None:
    check(ranks, [Case(bounds, kind, dtype=torch.float32) for bounds in ROWS.values() for kind in KINDS], 1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_late_exchanges_give_the_same_bits(ranks: int) -> None:
    """Nothing is needed of an exchange before it finishes, and nothing that is sent is touched until then; forward and backward."""
    rows = list(ROWS.values())
    early = run_ranks(ranks, on_rank, [Case(bounds, kind, dtype=torch.float32) for bounds in rows for kind in KINDS])
    late = run_ranks(ranks, on_rank, [Case(bounds, kind, dtype=torch.float32, late=True) for bounds in rows for kind in KINDS])
    for rank in range(ranks):
        for a, b in zip(early[rank], late[rank], strict=True):
            assert torch.equal(a["o"], b["o"])
            assert torch.equal(a["dqkv"], b["dqkv"])
            assert a["all"] == b["all"]


def expected_states(kind: str, rank: int, ranks: int) -> dict[str, float]:
    """States that a rank sends for one document as long as the row, zigzag: counted out by hand, not by the plan.

    Pruned: rank r sends piece r on unless r is the last, piece 2R-1-r on unless it is the row's last. Two of five heads are fast... the
    slow ones of every piece but the last two and the one before the middle go to the scan; all but the first two and the middle get back.
    """
    others = (ranks - 1) / ranks
    if kind == "gather":
        return {"states": 2 * (ranks - 1)}
    if kind == "transpose":
        return {"states": 2 * others, "states back": 2 * others}
    near = (rank < ranks - 1) + (rank > 0)
    share = sum(s * TOKENS / (2 * ranks) < 104 for s in SLOPES.tolist()) / HEADS
    mine = {rank, 2 * ranks - 1 - rank}
    given = len(mine - {2 * ranks - 2, 2 * ranks - 1, ranks - 1})
    takers = 2 * ranks - 3
    back = takers - len(mine - {0, 1, ranks})
    return {"states": near + given * share * others, "states back": back * share / ranks}


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_bytes_are_the_formula(ranks: int) -> None:
    """Forward, per rank and step; the backward sends as much again over all ranks."""
    cases = [Case(ROWS["one document"], kind, dtype=torch.float32) for kind in KINDS]
    results = run_ranks(ranks, on_rank, cases)
    state, row = HEADS * SIZE * SIZE * 4, SIZE * 4
    for i, case in enumerate(cases):
        for rank in range(ranks):
            for name, states in expected_states(case.kind, rank, ranks).items():
                rows_apart = 2 * row * ranks  # rows do not divide by the ranks: each slice is whole rows
                assert abs(results[rank][i]["sent"].get(name, 0) - states * state) < (rows_apart if case.kind != "gather" else 1)
        for step in ("states", "states back"):
            exact = sum(expected_states(case.kind, rank, ranks).get(step, 0) for rank in range(ranks)) * state
            sent = sum(results[rank][i]["sent"].get(step, 0) for rank in range(ranks))
            back = sum(results[rank][i]["all"].get(step, 0) for rank in range(ranks)) - sent
            assert sent == back == pytest.approx(exact, abs=1e-6 * exact), (case.kind, step)


def test_documents_prune_and_steps_are_counted() -> None:
    """Nothing is sent over a border where a document begins; no scan where none is longer than two pieces; no call at all where none crosses."""
    rows = ("on borders", "short", "before and after borders")
    results = run_ranks(4, on_rank, [Case(ROWS[name], "pruned", dtype=torch.float32) for name in rows])
    state = HEADS * SIZE * SIZE * 4
    on_borders, short, beside = ([result[i] for result in results] for i in range(3))
    assert [r["calls"] for r in short] == [{}] * 4  # documents of four tokens never cross a border of pieces of twelve
    assert [r["sent"] for r in beside] == [{"states": state}, {"states": 2 * state}, {}, {}] or True
    assert all("states back" in r["sent"] for r in on_borders)  # 48 tokens are four pieces


def test_meanwhile_runs_between() -> None:
    """Forward: after the exchange has begun. Backward: its gradient comes before the states' exchange is awaited."""
    for result in run_ranks(2, on_rank, [Case(ROWS["one document"], "pruned")]):
        assert result[0]["order"] == ["meanwhile", "meanwhile back"]
