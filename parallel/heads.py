"""Neighbours trade tokens for heads: each has some tokens of all heads, then all their tokens of some heads, and back.

DeepSpeed-Ulysses (arXiv 2309.14509) among the ranks of one node. Context rank = ring rank * degree + key-value rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.collectives import Channel
from parallel.pieces import Pieces


def check_heads(key_value_heads: int, degree: int) -> None:
    """ValueError where `degree` ranks cannot share out a rank's key-value heads (those that tensor parallelism leaves it)."""
    if key_value_heads % degree:
        raise ValueError(
            f"layout.key_value is {degree}, and a rank has {key_value_heads} key-value heads: set it to a divisor of {key_value_heads}"
        )


def split_heads(x: Tensor, pieces: Pieces, key_value: Channel, ring_rank: int) -> Tensor:
    """`[n, H, D]`, this rank's tokens -> `[m n, H / m, D]`, the m neighbours' tokens in the order of the row; rank i has the i-th heads.

    `pieces` is of all context ranks. The inverse of split_tokens, which is its backward.
    """
    check_heads(x.shape[1], key_value.size)
    y: Tensor = _SplitHeads.apply(x, pieces, key_value, ring_rank) if key_value.size > 1 else x
    return y


def split_tokens(x: Tensor, pieces: Pieces, key_value: Channel, ring_rank: int) -> Tensor:
    """`[m n, H / m, D]`, the neighbours' tokens in the order of the row -> `[n, H, D]`, this rank's; see split_heads."""
    y: Tensor = _SplitTokens.apply(x, pieces, key_value, ring_rank) if key_value.size > 1 else x
    return y


def _to_heads(x: Tensor, pieces: Pieces, key_value: Channel, ring_rank: int) -> Tensor:
    degree, tokens = key_value.size, len(x)
    by_rank = x.unflatten(1, (degree, -1)).transpose(0, 1).flatten(0, 1)
    arrived = key_value.begin_all_to_all(by_rank.contiguous(), [tokens] * degree, [tokens] * degree, "heads").finish()
    return torch.cat([arrived[rows] for rows in _order(pieces, degree, ring_rank)])


def _to_tokens(x: Tensor, pieces: Pieces, key_value: Channel, ring_rank: int) -> Tensor:
    degree, tokens = key_value.size, len(x) // key_value.size
    by_rank, parts = x.new_empty(x.shape), x.split(pieces.length)
    for rows, part in zip(_order(pieces, degree, ring_rank), parts, strict=True):
        by_rank[rows] = part
    arrived = key_value.begin_all_to_all(by_rank, [tokens] * degree, [tokens] * degree, "heads").finish()
    return arrived.unflatten(0, (degree, tokens)).transpose(0, 1).flatten(1, 2)


def _order(pieces: Pieces, degree: int, ring_rank: int) -> list[slice]:
    """Where the pieces of the ring rank, in the order of the row, lie in what the neighbours hold, neighbour after neighbour."""
    place = {}
    for neighbour in range(degree):
        for slot, piece in enumerate(pieces.held(ring_rank * degree + neighbour)):
            start = (neighbour * pieces.slots + slot) * pieces.length
            place[piece] = slice(start, start + pieces.length)
    return [place[piece] for piece in sorted(place)]


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *exchange: Any) -> Tensor:
        ctx.exchange = exchange
        return _to_heads(x, *exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _to_tokens(dy, *ctx.exchange), None, None, None


class _SplitTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *exchange: Any) -> Tensor:
        ctx.exchange = exchange
        return _to_tokens(x, *exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _to_heads(dy, *ctx.exchange), None, None, None
