"""Which rows of which states go where, as tables of numbers: exchanges then need a few operations, however many pieces there are.

A row is D numbers; a state has H * D of them, counted in one go through all slots of a rank. Tables are made on the host, once per row
of tokens, and copied to the states' device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from parallel.states import Flow


def cuts(rows: int, ranks: int) -> list[tuple[int, int]]:
    """Rows low .. high - 1 for each rank: as even as can be."""
    return [(rows * rank // ranks, rows * (rank + 1) // ranks) for rank in range(ranks)]


def in_order(flow: Flow) -> list[int]:
    """All pieces, rank after rank and slot after slot."""
    return list(chain.from_iterable(flow.held))


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Which of P pieces' states matter to which of T pieces."""

    reaches_TP: Tensor
    """bool"""
    between_TP: Tensor
    """How many whole pieces lie between the two, in the states' dtype; 0 where the state does not matter."""


def reach(flow: Flow, sources: Sequence[int], targets: Sequence[int], like: Tensor, *, nearest: bool = True) -> Reach:
    """Not `nearest`: the state of the piece just before a target is left out."""
    early, late = np.array(sources, np.int64)[None, :], np.array(targets, np.int64)[:, None]
    gives, takes, first = (np.array(table)[pieces] for table, pieces in ((flow.sources, early), (flow.targets, late), (flow.first, late)))
    between = late - 1 - early
    found = gives & takes & (first <= early) & (between >= (0 if nearest else 1))
    return Reach(reaches_TP=_on_device(found, like), between_TP=_on_device(np.where(found, between, 0), like).to(like.dtype))


def entering(given_PRD: Tensor, rates_R: Tensor, table: Reach) -> Tensor:
    """`[T, R, D]`: for each target the sum over the sources that matter of exp(rate * pieces between) * rows given.

    `given_PRD` may be written to. Where a source holds NaN or infinity, those it reaches get NaN, and no others: 0 * NaN would be NaN.
    """
    if not given_PRD.numel():
        return given_PRD.new_zeros(len(table.reaches_TP), *given_PRD.shape[1:])
    weights_RTP = torch.exp(rates_R[:, None, None] * table.between_TP) * table.reaches_TP
    largest_P = torch.linalg.vector_norm(given_PRD.flatten(1), torch.inf, dim=1)
    broken_P = ~(largest_P <= torch.finfo(given_PRD.dtype).max)
    given_PRD.masked_fill_(broken_P[:, None, None], 0.0)
    total_TRD = torch.bmm(weights_RTP, given_PRD.transpose(0, 1)).transpose(0, 1).contiguous()
    return total_TRD.masked_fill_((table.reaches_TP & broken_P).any(1)[:, None, None], torch.nan)


def strips(slots: Sequence[int], rows: Sequence[int] | np.ndarray, whole: int, ranks: int) -> list[np.ndarray]:
    """For each rank its share of these `rows` of a state, of one slot after the other; a state has `whole` rows."""
    table = np.array(slots, np.int64)[:, None] * whole + np.asarray(rows, np.int64)
    return [table[:, low:high].ravel() for low, high in cuts(table.shape[1], ranks)]


@dataclass(frozen=True, kw_only=True)
class Transposed:
    """Tables of an exchange of all rows of all slots."""

    send: Tensor
    """Rows in the order in which they are sent, rank after rank; results come back in the same order."""
    sent: list[int]
    """How many go to each rank."""
    received: list[int]
    reach: Reach


def transposed(flow: Flow, rank: int, states: Tensor) -> Transposed:
    """As `rank` sees it."""
    slots, heads, size, _ = states.shape
    rows, ranks, pieces = heads * size, len(flow.held), in_order(flow)
    parts = strips(range(slots), range(rows), rows, ranks)
    return Transposed(
        send=_on_device(np.concatenate(parts), states),
        sent=[len(part) for part in parts],
        received=[len(parts[rank])] * ranks,
        reach=reach(flow, pieces, pieces, states),
    )


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Tables of an exchange of what can still matter: whole states for the next piece, rows of slow heads for those behind it."""

    send: Tensor
    sent: list[int]
    received: list[int]
    near: list[tuple[int, int]]
    """(slot, where its state begins in the rows received)"""
    far: Tensor
    """Where the rows to be scanned lie in those received: piece after piece, as many of each."""
    reach: Reach
    back_sent: list[int]
    back_received: list[int]
    back: Tensor
    """Where the rows that come back belong."""


def needed(flow: Flow, rank: int, states: Tensor, slow: Sequence[int]) -> Needed:
    """As `rank` sees it; `slow` are the heads whose rows are scanned."""
    heads, size = states.shape[1:3]
    whole, ranks, held = heads * size, len(flow.held), flow.held
    rows = (np.array(slow, np.int64)[:, None] * size + np.arange(size)).ravel()
    slot = {piece: i for i, piece in enumerate(held[rank])}
    gives, takes = ([[p for p in pieces if p in far] for pieces in held] for far in (flow.far_sources, flow.far_targets))
    near_to = [[p - 1 for p in pieces if p in flow.near and p - 1 in slot] for pieces in held]
    parts = strips([slot[p] for p in gives[rank]], rows, whole, ranks)
    send = [np.concatenate([*(np.arange(whole) + slot[p] * whole for p in near_to[r]), parts[r]]) for r in range(ranks)]
    low, high = cuts(len(rows), ranks)[rank]
    width, at, received, near, far = high - low, 0, [], [], []
    for r in range(ranks):
        mine = [p for p in held[rank] if p in flow.near and flow.owners[p - 1] == r]
        near += [(slot[p], at + i * whole) for i, p in enumerate(mine)]
        received.append(len(mine) * whole + len(gives[r]) * width)
        far.append(np.arange(at + len(mine) * whole, at + received[-1]))
        at += received[-1]
    back = strips([slot[p] for p in takes[rank]], rows, whole, ranks)
    return Needed(
        send=_on_device(np.concatenate(send), states),
        sent=[len(part) for part in send],
        received=received,
        near=near,
        far=_on_device(np.concatenate(far), states),
        reach=reach(flow, list(chain(*gives)), list(chain(*takes)), states, nearest=False),
        back_sent=[len(pieces) * width for pieces in takes],
        back_received=[len(part) for part in back],
        back=_on_device(np.concatenate(back), states),
    )


def _on_device(table: np.ndarray, like: Tensor) -> Tensor:
    """Without making the device wait."""
    host = torch.from_numpy(table)
    return host.pin_memory().to(like.device, non_blocking=True) if like.device.type == "cuda" else host
