"""Varlen causal softmax attention over the pieces of a packed row: keys and values travel between context ranks, queries stay.

Hop h brings a rank what it needs of the keys and values of rank - h, straight from their owner (Ring Attention, arXiv 2310.01889, with the
zigzag pieces of Llama 3, arXiv 2407.21783 section 3.3.2). While one hop is computed the next is under way. Results of hops are merged by
their log-sum-exp (Blockwise Attention, arXiv 2305.19370), so that each query's softmax is over all it sees. In the backward pass keys and
values travel again, and gradients of what came go straight back to their owner.

Two levels (`attention_over_pieces`): neighbours first trade tokens for heads, so that the ring has fewer ranks, which hold more.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.collectives import Channel, Pending
from parallel.heads import split_heads, split_tokens
from parallel.pieces import Pieces
from parallel.ring_plan import Hop, Plan, Rectangle, plan_ring


class PartialAttention(Protocol):
    """This rank's attention over some of the keys. Bounds are cu_seqlens on the host; a document's queries see its keys.

    With `causal` (the two bounds are then the same) a query sees the keys up to its own row, without it all keys of its document.
    """

    @property
    def forward(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """(q `[n, H, D]`, k `[m, G, D]`, v `[m, G, D]`, query_bounds, key_bounds, causal) -> (o `[n, H, D]`, log-sum-exp `[n, H]`)."""

    @property
    def backward(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """(do, q, k, v, o, lse, query_bounds, key_bounds, causal) -> (dq, dk, dv); o and lse are those over all keys."""


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, channel: Channel, attend: PartialAttention, first: Pending | None = None
) -> Tensor:
    """Causal attention inside documents: o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j over the j <= i of i's document.

    q `[n, H, D]` and k, v `[n, G, D]` are the rank's tokens as Pieces.cut gives them; G divides H. Returns o `[n, H, D]` in q's dtype.
    `first` is what begin_first_hop returned, where it was called before. Every rank calls this in the same order among its exchanges.
    Parts are merged and gradients summed in fp32 (fp64 for fp64); gradients travel in k's dtype. Kept for the backward pass: q, k, v, o and
    the log-sum-exp `[n, H]`. Raises ValueError where the tensors or the channel do not fit the pieces.
    """
    if channel.size != pieces.ranks:
        raise ValueError(f"{pieces.ranks} ranks hold the pieces and {channel.size} are in the channel: make both from one layout")
    tokens = pieces.tokens // pieces.ranks
    if (len(q), len(k), len(v)) != (tokens, tokens, tokens):
        raise ValueError(
            f"q, k, v have {len(q)}, {len(k)}, {len(v)} tokens, the rank holds {tokens} of the row: give what Pieces.cut returns"
        )
    o: Tensor = _Ring.apply(q, k, v, pieces, channel, attend, first)
    return o


def begin_first_hop(k: Tensor, v: Tensor, pieces: Pieces, channel: Channel) -> Pending | None:
    """Sends keys and values of the first hop on their way, while queries are still being made; None where no rank needs any."""
    hops = _plan(pieces, channel).hops
    return _begin(hops[0], k.detach(), v.detach(), channel) if hops else None


def attention_over_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Pieces,
    key_value: Channel,
    ring: Channel,
    attend: PartialAttention,
    first: Pending | None = None,
) -> Tensor:
    """ring_attention over context ranks = ring rank * m + key-value rank: the m `key_value` ranks share out heads, the ring the tokens.

    `pieces` is of all context ranks, shapes are those of ring_attention, and m = 1 is ring_attention itself. `first`, from begin_first_hop,
    is for m = 1; with more it is begun here, while queries trade places. Raises ValueError where m does not divide G, or as ring_attention.
    """
    if first is not None and key_value.size > 1:
        raise ValueError(
            f"the first hop was begun before {key_value.size} key-value ranks had traded heads: leave it to attention_over_pieces"
        )
    joined = pieces.joined(key_value.size)
    k, v = (split_heads(x, pieces, key_value, ring.rank) for x in (k, v))
    first = first or begin_first_hop(k, v, joined, ring)
    o = ring_attention(split_heads(q, pieces, key_value, ring.rank), k, v, joined, ring, attend, first)
    return split_tokens(o, pieces, key_value, ring.rank)


def _plan(pieces: Pieces, channel: Channel) -> Plan:
    """Made once per row: all softmax layers have the same."""
    return pieces.once(("ring", channel.rank), lambda: plan_ring(pieces, channel.rank))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, channel: Channel, attend: PartialAttention, first: Pending | None
    ) -> Tensor:
        plan = _plan(pieces, channel)
        arriving = first or _begin_next(plan.hops, k, v, channel)
        own, lse = attend.forward(q, k, v, plan.bounds, plan.bounds, True)
        merged = own if plan.alone else own.to(lse.dtype)
        for part in plan.own:
            _add_part(merged, lse, q, k, v, part, attend)
        for i, hop in enumerate(plan.hops):
            k_hop, v_hop = _finish(arriving).unbind(1)
            arriving = _begin_next(plan.hops[i + 1 :], k, v, channel)
            for part in hop.rectangles:
                _add_part(merged, lse, q, k_hop, v_hop, part, attend)
        o = merged.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.plan, ctx.channel, ctx.attend = plan, channel, attend
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> Any:
        q, k, v, o, lse = ctx.saved_tensors
        plan, channel, attend = ctx.plan, ctx.channel, ctx.attend
        do = do.contiguous()
        whole = do, q, o, lse
        arriving = _begin_next(plan.hops, k, v, channel)
        own = attend.backward(do, q, k, v, o, lse, plan.bounds, plan.bounds, True)
        dq, dk, dv = own if plan.alone else (x.to(lse.dtype) for x in own)
        for part in plan.own:
            _add_gradients((dq, dk, dv), whole, (k, v), part, attend)
        returning: list[tuple[Hop, Pending]] = []
        for i, hop in enumerate(plan.hops):
            arrived = _finish(arriving)
            arriving = _begin_next(plan.hops[i + 1 :], k, v, channel)
            sums = torch.zeros_like(arrived, dtype=lse.dtype)
            for part in hop.rectangles:
                _add_gradients((dq, *sums.unbind(1)), whole, arrived.unbind(1), part, attend)
            returning.append((hop, _begin_return(hop, sums.to(k.dtype), channel)))
            if i > 0:
                _take_back(dk, dv, *returning.pop(0))
        for hop, pending in returning:
            _take_back(dk, dv, hop, pending)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _add_part(merged: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, part: Rectangle, attend: PartialAttention) -> None:
    """Merges, in place, attention over the keys of one rectangle into that over all keys before."""
    q, k, v = q[part.queries], k[part.keys], v[part.keys]
    o, sums = attend.forward(q, k, v, (0, len(q)), (0, len(k)), False)
    before = lse[part.queries]
    after = torch.logaddexp(before, sums)
    rows = merged[part.queries]
    rows *= (before - after).exp()[..., None]
    rows += (sums - after).exp()[..., None] * o
    before.copy_(after)


def _add_gradients(
    gradients: Sequence[Tensor], whole: Sequence[Tensor], keys_values: Sequence[Tensor], part: Rectangle, attend: PartialAttention
) -> None:
    """Adds one rectangle's share to (dq, dk, dv); `whole` is do, q, o and lse of all local queries."""
    do, q, o, lse = (x[part.queries] for x in whole)
    k, v = (x[part.keys] for x in keys_values)
    shares = attend.backward(do, q, k, v, o, lse, (0, len(q)), (0, len(k)), False)
    for total, rows, share in zip(gradients, (part.queries, part.keys, part.keys), shares, strict=True):
        total[rows] += share


def _begin_next(hops: Sequence[Hop], k: Tensor, v: Tensor, channel: Channel) -> Pending | None:
    """Begins the first of the hops that are left, if any."""
    return _begin(hops[0], k, v, channel) if hops else None


def _begin(hop: Hop, k: Tensor, v: Tensor, channel: Channel) -> Pending:
    """What arrives is `[hop.receive, 2, G, D]`, keys and values."""
    rows = torch.cat([torch.stack((k[part], v[part]), 1) for part in hop.send or (slice(0, 0),)])
    return _exchange(rows, hop.distance, hop.receive, channel, "ring keys and values")


def _begin_return(hop: Hop, gradients: Tensor, channel: Channel) -> Pending:
    """The gradients of what `_begin` brought, back to where it came from."""
    return _exchange(gradients, -hop.distance, hop.sent, channel, "ring gradients")


def _take_back(dk: Tensor, dv: Tensor, hop: Hop, pending: Pending) -> None:
    """Adds, in place, what others' queries give to the rows that were sent to them."""
    start, returned = 0, pending.finish()
    for rows in hop.send:
        stop = start + rows.stop - rows.start
        for total, share in zip((dk, dv), returned[start:stop].unbind(1), strict=True):
            total[rows] += share
        start = stop


def _exchange(rows: Tensor, distance: int, receive: int, channel: Channel, name: str) -> Pending:
    """`rows` to rank + distance, `receive` rows from rank - distance. An all-to-all: NCCL connects for sends at the first of each pair."""
    send_splits, receive_splits = [0] * channel.size, [0] * channel.size
    send_splits[(channel.rank + distance) % channel.size] = len(rows)
    receive_splits[(channel.rank - distance) % channel.size] = receive
    return channel.begin_all_to_all(rows, send_splits, receive_splits, name)


def _finish(pending: Pending | None) -> Tensor:
    assert pending is not None, "a hop of the plan was never begun"
    return pending.finish()
