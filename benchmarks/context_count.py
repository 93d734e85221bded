"""Bytes that real gloo ranks send in small layers, as Channel counts them, beside context_formula's for the same rows."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from context_formula import crossings, keys_values_sent, mirrored, states_sent

from minimax_train.model.lightning import decay_slopes
from parallel.exchange import BACK, FORWARD, slow_heads
from parallel.layout import Layout
from parallel.pieces import cut_row
from parallel.testing import run_ranks
from parallel.world import Place

HEADS, GROUPS, SIZE, TOKENS = 8, 4, 16, 4096
LAYERS = (0, 38, 62, 78)
KEYS_VALUES, GRADIENTS, TRADED = "ring keys and values", "ring gradients", "heads"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One small layer over one row."""

    row: str
    bounds: tuple[int, ...]
    kind: str
    """An exchange of states, or "ring"."""
    layer: int = 0
    key_value: int = 1

    def slopes(self, whole: int) -> torch.Tensor:
        """Those of the model's layer, faster as its row of `whole` tokens is longer: pieces forget as much as there."""
        return decay_slopes(HEADS, self.layer, 80) * (whole / TOKENS)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Bytes that ranks 0, 1, ... sent, and by formula; forward and backward."""

    case: Case
    ranks: int
    counted: dict[str, list[int]]
    formula: dict[str, list[int]]

    @property
    def equal(self) -> bool:
        return self.counted == self.formula


def small_cases(rows: dict[str, tuple[int, ...]], ranks: int) -> list[Case]:
    """`rows`: name and cu_seqlens of TOKENS tokens."""
    kinds = ("gather", "transpose", "pruned", "auto")
    cases = [Case(row=row, bounds=b, kind=kind, layer=layer) for row, b in rows.items() for kind in kinds for layer in LAYERS]
    degrees = [degree for degree in (1, 2, 4) if degree == 1 or degree < ranks]
    return cases + [Case(row=row, bounds=b, kind="ring", key_value=degree) for row, b in rows.items() for degree in degrees]


def count(rows: dict[str, tuple[int, ...]], ranks: int, whole: int) -> list[Counted]:
    """Runs every small case on `ranks` ranks; `whole`: tokens of the rows that these are small forms of."""
    cases = small_cases(rows, ranks)
    sent: dict[Case, list[dict[str, int]]] = {}
    for degree in sorted({case.key_value for case in cases}):
        mine = [case for case in cases if case.key_value == degree]
        for result in run_ranks(ranks, on_rank, mine, whole):
            for case, one in zip(mine, result, strict=True):
                sent.setdefault(case, []).append(one)
    return [
        Counted(
            case=case,
            ranks=ranks,
            counted={name: [one[name] for one in sent[case]] for name in sent[case][0]},
            formula=by_formula(case, ranks, whole),
        )
        for case in cases
    ]


def by_formula(case: Case, ranks: int, whole: int) -> dict[str, list[int]]:
    bounds, owners = case.bounds, cut_row(case.bounds, ranks).owners
    if case.kind == "ring":
        sent = keys_values_sent(bounds, owners, HEADS, GROUPS, SIZE, degree=case.key_value)
        parts = {"heads": sent.heads, "ring": sent.ring, "heads back": sent.heads_back, "ring back": sent.ring_back}
        return {name: part.tolist() for name, part in parts.items()}
    slow = len(slow_heads(case.slopes(whole).tolist(), TOKENS // (2 * ranks)))
    rows = {"forward": (bounds, owners), "back": mirrored(bounds, owners)}
    return {name: states_sent(case.kind, crossings(*row), HEADS, SIZE, slow).bytes.tolist() for name, row in rows.items()}


def on_rank(place: Place, cases: list[Case], whole: int) -> list[dict[str, int]]:
    from minimax_train.engine.session import session

    torch.set_num_threads(1)
    with session(layout=Layout(context=place.size, key_value=cases[0].key_value), place=place) as joined:
        return [ring(case, joined.groups) if case.kind == "ring" else states(case, joined.groups, whole) for case in cases]


def states(case: Case, groups: Any, whole: int) -> dict[str, int]:
    """Forward and backward of one lightning operator."""
    from minimax_train.kernels.lightning_steps import LocalDocuments, lightning_steps
    from parallel.collectives import Channel
    from parallel.exchange import make_exchange
    from parallel.lightning import Passing, lightning_over_pieces
    from parallel.states import state_flow

    channel, pieces = Channel(groups.context.group), cut_row(case.bounds, groups.context.size)
    local, flow, slopes = pieces.local(channel.rank), state_flow(pieces), case.slopes(whole)
    cu_seqlens = torch.tensor(local.bounds, dtype=torch.int32)
    documents = LocalDocuments(cu_seqlens=cu_seqlens, bounds=list(local.bounds), enters=local.enters, leaves=local.leaves)
    steps = lightning_steps(slopes, documents, backend="cpu", dtype=torch.float32, head_size=SIZE)
    exchange = make_exchange(case.kind, slopes, slopes.tolist(), pieces.length, channel.size, torch.float32)
    qkv = torch.randn(local.bounds[-1], HEADS, 3, SIZE, requires_grad=True)
    passing = Passing(exchange=exchange, flow=flow, back=flow.mirrored(), channel=channel)
    o, _ = lightning_over_pieces(qkv, steps, passing, lambda: None)
    forward = channel.bytes[FORWARD] + channel.bytes[BACK]
    o.sum().backward()
    assert channel.bytes.keys() <= {FORWARD, BACK}
    return {"forward": forward, "back": channel.bytes.total() - forward}


def ring(case: Case, groups: Any) -> dict[str, int]:
    """Forward and backward of one attention operator."""
    from minimax_train.kernels.partial_attention import partial_attention
    from parallel.collectives import Channel
    from parallel.ring import attention_over_pieces

    pieces, n = cut_row(case.bounds, groups.context.size), TOKENS // groups.context.size
    q, k, v = (torch.randn(n, heads, SIZE, dtype=torch.bfloat16, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS))
    attend = partial_attention("sdpa", device=q.device, dtype=q.dtype, head_size=SIZE)
    neighbours, along = Channel(groups.key_value.group), Channel(groups.ring.group)
    o = attention_over_pieces(q, k, v, pieces, neighbours, along, attend)
    before = Counter({"heads": neighbours.bytes[TRADED], "ring": along.bytes[KEYS_VALUES]})
    o.sum().backward()
    assert along.bytes.keys() <= {KEYS_VALUES, GRADIENTS}
    assert neighbours.bytes.keys() <= {TRADED}
    return {
        "heads": before["heads"],
        "ring": before["ring"],
        "heads back": neighbours.bytes[TRADED] - before["heads"],
        "ring back": along.bytes.total() - before["ring"],
    }
