"""Lightning attention over pieces on real gloo ranks, against the fp64 definition on the whole row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minimax_train.model.lightning import decay_slopes
from parallel.exchange import make_exchange, slow_heads
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
    spoilt: int | None = None
    """A document full of NaN."""

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
    from parallel.world import joined, meet

    torch.set_num_threads(1)
    with joined(place, "gloo", meet(place)):
        assert dist.group.WORLD is not None
        return [one_case(case, Channel(dist.group.WORLD, late=case.late)) for case in cases]


def one_case(case: Case, channel: Any, events: list[str] | None = None) -> dict[str, Any]:
    from minimax_train.kernels.lightning_steps import LocalDocuments, lightning_steps
    from parallel.lightning import Passing, lightning_over_pieces
    from parallel.states import state_flow

    pieces, rank = case.pieces(channel.size), channel.rank
    whole, *upstream = whole_row(case.dtype)
    if case.spoilt is not None:
        whole[case.bounds[case.spoilt] : case.bounds[case.spoilt + 1]] = torch.nan
    qkv, do, other = (pieces.cut(x, rank).contiguous() for x in (whole, *upstream))
    local, flow = pieces.local(rank), state_flow(pieces)
    documents = LocalDocuments(
        cu_seqlens=torch.tensor(local.bounds, dtype=torch.int32), bounds=list(local.bounds), enters=local.enters, leaves=local.leaves
    )
    steps = lightning_steps(SLOPES, documents, backend=case.backend, dtype=case.dtype, head_size=SIZE)
    states = torch.promote_types(case.dtype, torch.float32)
    exchange = make_exchange(case.kind, SLOPES, SLOPES.tolist(), pieces.length, channel.size, states)
    passing = Passing(exchange=exchange, flow=flow, back=flow.mirrored(), channel=channel)
    qkv.requires_grad_()
    order: list[str] = [] if events is None else events
    meanwhile = qkv.new_ones(len(qkv), 3).requires_grad_()

    def work() -> Tensor:
        order.append("meanwhile")
        return meanwhile * 2

    o, result = lightning_over_pieces(qkv, steps, passing, work)
    meanwhile.register_hook(lambda _: order.append("meanwhile back"))
    sent = Counter(channel.bytes)
    dqkv, dother = torch.autograd.grad((o * do).sum() + (result * other).sum(), [qkv, meanwhile])
    assert torch.equal(dother, 2 * other)
    return {"o": o.detach(), "dqkv": dqkv, "sent": dict(sent), "all": dict(channel.bytes), "calls": dict(channel.calls)}


def truth(bounds: tuple[int, ...], qkv: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
    from minimax_train.kernels import lightning_attention

    qkv = qkv.double().requires_grad_()
    q, k, v = torch.nn.functional.silu(qkv)[None].unbind(3)
    o, _ = lightning_attention(q, k, v, SLOPES, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend="definition")
    return o[0].detach(), torch.autograd.grad((o[0] * do.double()).sum(), qkv)[0]


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
                assert a == b or relative(ours[a:b], exact[a:b]) < tolerance, (case, name, document)


@pytest.mark.parametrize("ranks", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_pieces_equal_the_whole(ranks: int) -> None:
    """Every exchange, zigzag and balanced owners, documents beginning anywhere; every document's outputs and gradients by themselves."""
    rows = drawn(25)
    cases = [Case(bounds, kind) for bounds in rows for kind in KINDS]
    cases += [Case(bounds, kind, owners="balanced") for bounds in rows[:12] for kind in KINDS]
    cases += [Case(bounds, "auto", backend="definition") for bounds in list(ROWS.values())[:2]]
    cases += [Case(bounds, "auto") for bounds in rows[:12]]
    check(ranks, cases, 1e-10)


@pytest.mark.parametrize("ranks", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_in_fp32(ranks: int) -> None:
    check(ranks, [Case(bounds, kind, dtype=torch.float32) for bounds in ROWS.values() for kind in KINDS], 1e-5)


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("ranks", [2, 4])
def test_documents_do_not_leak(ranks: int) -> None:
    """A document full of NaN changes no bit of the others, forward or backward."""
    names = [name for name in ROWS if len(ROWS[name]) > 3]
    cases = [Case(ROWS[name], kind, dtype=torch.float32) for name in names for kind in KINDS]
    clean = run_ranks(ranks, on_rank, cases)
    for spoilt in (0, 1, 2):
        results = run_ranks(ranks, on_rank, [replace(case, spoilt=spoilt) for case in cases])
        for i, case in enumerate(cases):
            first, end = case.bounds[spoilt], case.bounds[spoilt + 1]
            for name in ("o", "dqkv"):
                a, b = (case.pieces(ranks).join([result[i][name] for result in outcome]) for outcome in (results, clean))
                assert a[first:end].isnan().any()
                assert torch.equal(a[:first], b[:first]), (case, spoilt, name)
                assert torch.equal(a[end:], b[end:]), (case, spoilt, name)


def expected_bytes(case: Case, rank: int, ranks: int) -> dict[str, int]:
    """What a rank sends forward in fp32, from the tokens and the definition of each exchange alone."""
    if case.kind == "auto":
        each = [[expected_bytes(replace(case, kind=kind), r, ranks) for r in range(ranks)] for kind in KINDS]
        return min(each, key=lambda sent: sum(sum(one.values()) for one in sent))[rank]
    pieces, rows, row = case.pieces(ranks), HEADS * SIZE, SIZE * 4
    owners, length = pieces.owners, pieces.length
    width = rows * (rank + 1) // ranks - rows * rank // ranks
    if case.kind == "gather":
        return {"states": 2 * (ranks - 1) * rows * row}
    if case.kind == "transpose":
        return {"states": 2 * (rows - width) * row, "states back": 2 * (ranks - 1) * width * row}
    document = [d for d, (a, b) in enumerate(zip(case.bounds, case.bounds[1:], strict=False)) for _ in range(b - a)]
    goes_on = {p: document[p * length - 1] == document[p * length] and owners[p - 1] != owners[p] for p in range(1, 2 * ranks)}
    same = {(i, j): document[(i + 1) * length - 1] == document[j * length] for j in range(2 * ranks) for i in range(j)}
    pairs = {(i, j) for i, j in same if same[i, j] and goes_on[i + 1] and goes_on[j]}  # state i matters to piece j
    slow = sum(s * length < 104 for s in SLOPES.tolist()) * SIZE
    width = slow * (rank + 1) // ranks - slow * rank // ranks
    near = sum(owners[i] == rank for i, j in pairs if j == i + 1)
    given = sum(owners[i] == rank for i in {i for i, j in pairs if j > i + 1})
    returned = sum(owners[j] != rank for j in {j for i, j in pairs if j > i + 1})
    sent = {"states": near * rows * row + given * (slow - width) * row, "states back": returned * width * row}
    return {name: size for name, size in sent.items() if size}


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_bytes_are_the_formula(ranks: int) -> None:
    """To the byte on every rank, every exchange, any documents; the backward sends as much again, all ranks together."""
    cases = [Case(bounds, kind, dtype=torch.float32) for bounds in ROWS.values() for kind in (*KINDS, "auto")]
    cases += [Case(bounds, kind, owners="balanced", dtype=torch.float32) for bounds in drawn(10) for kind in ("pruned", "auto")]
    results = run_ranks(ranks, on_rank, cases)
    for i, case in enumerate(cases):
        sent = [{name: size for name, size in results[rank][i]["sent"].items() if size} for rank in range(ranks)]
        assert sent == [expected_bytes(case, rank, ranks) for rank in range(ranks)], case
        for step in ("states", "states back"):
            both = sum(results[rank][i]["all"].get(step, 0) for rank in range(ranks))
            assert both == 2 * sum(one.get(step, 0) for one in sent), (case, step)


def counts(kind: str, bounds: tuple[int, ...], ranks: int, slopes: Sequence[float], heads: int, size: int, owners: str = "zigzag") -> int:
    """What the exchange says of itself: numbers that all ranks send for a row."""
    from parallel.states import state_flow

    pieces = Case(bounds, kind, owners).pieces(ranks)
    exchange = make_exchange(kind, torch.tensor(slopes), slopes, pieces.length, ranks, torch.float32)
    return exchange.numbers_sent(state_flow(pieces), heads, size)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_default_sends_least(ranks: int) -> None:
    """By numbers that are what is sent to the byte, see above; on whatever row, for layers that remember little, much and for ever."""
    rows, chosen = drawn(40), Counter[str]()
    for case in (Case(bounds, "auto", owners) for bounds in rows for owners in ("zigzag", "balanced")):
        each = {}
        for kind in KINDS:
            one = replace(case, kind=kind)
            each[kind] = sum(sum(expected_bytes(one, rank, ranks).values()) for rank in range(ranks)) // 4
            assert each[kind] == counts(kind, case.bounds, ranks, SLOPES.tolist(), HEADS, SIZE, case.owners), one
        assert counts("auto", case.bounds, ranks, SLOPES.tolist(), HEADS, SIZE, case.owners) == min(each.values())
        for slopes in ([20.0] * HEADS, [0.0] * HEADS):
            each = {kind: counts(kind, case.bounds, ranks, slopes, HEADS, SIZE, case.owners) for kind in KINDS}
            assert counts("auto", case.bounds, ranks, slopes, HEADS, SIZE, case.owners) == min(each.values())
            chosen[min(each, key=lambda kind: each[kind])] += 1
    assert chosen["pruned"] > 0
    assert ranks == 2 or chosen["transpose"] > 0  # on two ranks the middle border is inside a rank, and gather sends as little


def test_the_model_at_a_million_tokens() -> None:
    """64 context ranks, pieces of 8,192 tokens, the model's own slopes: pruned sends at most 3 % of what gather sends, the default less."""
    from parallel.states import state_flow

    tokens = 64 * 2 * 8192
    rows = {documents: state_flow(Pieces(tuple(range(0, tokens + 1, tokens // documents)), zigzag(64))) for documents in (1, 32, 128)}
    sent = {(kind, documents): 0 for kind in (*KINDS, "auto") for documents in rows}
    for layer in (layer for layer in range(80) if (layer + 1) % 8):
        slopes = decay_slopes(64, layer, 80)
        vanished = torch.exp(-slopes * 8192) == 0.0
        slow = slow_heads(slopes.tolist(), 8192)
        assert slow == tuple((~vanished).nonzero().flatten().tolist())
        each = {kind: make_exchange(kind, slopes, slopes.tolist(), 8192, 64, torch.float32) for kind in (*KINDS, "auto")}
        for kind, documents in sent:
            sent[kind, documents] += each[kind].numbers_sent(rows[documents], 64, 128)
        best = min(KINDS, key=lambda kind: each[kind].numbers_sent(rows[1], 64, 128))
        assert best == ("pruned" if len(slow) <= 32 else "transpose")  # only the last layers remember so much
    for documents in rows:
        assert sent["auto", documents] <= min(sent[kind, documents] for kind in KINDS)
        shares = (f"{kind} {sent[kind, documents] / sent['gather', 1]:.2%}" for kind in (*KINDS, "auto"))
        print(f"{documents} documents, of gather: {', '.join(shares)}")
    assert sent["auto", 1] < sent["pruned", 1] < 0.03 * sent["gather", 1]
    assert sent["auto", 32] == sent["pruned", 32]  # of 32K tokens: no layer remembers enough of one for another exchange
    assert sent["auto", 128] == 0  # of a piece each: nobody needs anything


def test_slow_heads() -> None:
    assert slow_heads([0.9, 0.5, 0.1, 1e-4], 4096) == (3,)
    assert slow_heads([0.9, 0.02], 4096) == (1,)
    assert slow_heads([0.9, 0.02], 4096, cut=80.0) == ()  # a looser cut
    for ranks in (1, 2):
        with pytest.raises(ValueError, match="state exchange 'ring' is unknown"):
            make_exchange("ring", SLOPES, SLOPES.tolist(), 64, ranks, torch.float32)


def test_no_call_where_no_document_crosses() -> None:
    """Documents of four tokens in pieces of twelve; and no second step where none reaches past the next piece."""
    names = ("short", "before and after borders", "pairs")
    rows = {**ROWS, "pairs": (0, 6, 18, 30, 42, 54, 66, 78, 90, 96)}
    results = run_ranks(4, on_rank, [Case(rows[name], "pruned", dtype=torch.float32) for name in names])
    assert [result[0]["calls"] for result in results] == [{}] * 4
    assert [result[1]["calls"] for result in results] == [{"states": 2, "states back": 2}] * 4
    assert [result[2]["calls"] for result in results] == [{"states": 2}] * 4


def order_of_events(place: Place) -> list[str]:
    """What begins and finishes when, in one forward and backward."""
    import torch.distributed as dist

    from parallel.collectives import Channel, Pending
    from parallel.world import joined, meet

    events: list[str] = []

    class Watched(Channel):
        def begin_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], name: str) -> Pending:
            events.append(f"begin {name}")
            pending = super().begin_all_to_all(x, send, receive, name)
            finish = pending.finish
            pending.finish = lambda: (events.append(f"finish {name}"), finish())[1]  # type: ignore[method-assign]
            return pending

    with joined(place, "gloo", meet(place)):
        assert dist.group.WORLD is not None
        one_case(Case(ROWS["one document"], "pruned"), Watched(dist.group.WORLD), events)
    return events


def test_what_runs_meanwhile_runs_between() -> None:
    """Between begin and finish of the exchange: forward the caller's work, backward the backward of that."""
    second = ["begin states back", "finish states back"]
    forward = ["begin states", "meanwhile", "finish states", *second]
    backward = ["begin states", "meanwhile back", "finish states", *second]
    assert run_ranks(2, order_of_events) == [forward + backward] * 2
