"""What autograd keeps of a row for the backward pass, tensor by tensor, as read from the code that saves it.

Letters: T tokens, G = T tensor of them together, C hidden size, A this rank's attention width, K its key-value width, H its heads of D
channels, k choices a token, R rows its experts get, f its slice of their width, b bytes of a number of the model. On a CPU the norms are
torch's composite of operators, which keeps two fp32 tensors; on a GPU torch's fused one, which keeps its input.
"""

from dataclasses import dataclass

from minimax_train.kernels.lightning_cpu import BLOCK_NUMBERS, FEWEST_TOKENS
from minimax_train.model.config import LayerKind
from minimax_train.planner.sizes import Sizes

TRITON_STATES = 0.05
"""Of the bytes of q, k, v and o, at most, in states between segments: half of kernels.lightning_triton.STATES_SHARE, whose other half are
gradients."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One tensor, or several of one shape."""

    part: str
    """norms, mixer, states, router, experts, input, row or head."""
    name: str
    shape: str
    bytes: int


def layer_kept(s: Sizes, kind: LayerKind) -> list[Kept]:
    """Of a layer that is not run again in the backward pass; with recompute=selective without gate and up."""
    mixer = _lightning(s) if kind == "lightning" else _softmax(s)
    tokens = [
        *_norm(s, "attention_norm"),
        Kept(part="mixer", name="input h", shape="[T, C] b", bytes=s.tokens * s.hidden * s.bytes),
        *mixer,
        *_norm(s, "experts_norm"),
        Kept(part="router", name="input in fp32", shape="[T, C] fp32", bytes=s.tokens * s.hidden * 4),
        Kept(part="router", name="probabilities", shape="[T, E] fp32", bytes=s.tokens * s.experts * 4),
        Kept(part="router", name="choices and weights", shape="[T, k] int64, 3 fp32", bytes=s.sent * (8 + 12)),
        Kept(part="experts", name="order and inverse", shape="2 [T k] int64", bytes=s.sent * 16),
        Kept(part="experts", name="rows", shape="[R, C] b", bytes=s.received * s.hidden * s.bytes),
        Kept(part="experts", name="rows that came back", shape="[T k, C] b", bytes=s.sent * s.hidden * s.bytes),
    ]
    if s.recompute != "selective":
        tokens.append(Kept(part="experts", name="gate and up", shape="[R, 2 f] b", bytes=s.received * 2 * s.ffn * s.bytes))
    return tokens


def layer_input(s: Sizes) -> list[Kept]:
    """Of a layer that is run again: recompute=full."""
    return [
        Kept(part="input", name="input x", shape="[T, C] b", bytes=s.tokens * s.hidden * s.bytes),
        Kept(part="router", name="choices", shape="[T, k] int64, fp32", bytes=s.sent * 12),
        Kept(part="experts", name="order and inverse", shape="2 [T k] int64", bytes=s.sent * 16),
    ]


def row_kept(s: Sizes) -> list[Kept]:
    """Of a row that is under way, whatever the layers."""
    return [
        Kept(part="row", name="places", shape="[G] int64", bytes=s.gathered * 8),
        Kept(part="row", name="rotary cosines and sines", shape="2 [G, rotary / 2] fp32", bytes=s.gathered * s.rotary * 4),
    ]


def batch_rows(s: Sizes, rows: int) -> int:
    """Bytes of tokens, labels and positions, 3 [G] int64, of all rows that a data-parallel rank has of a batch: they are there at once."""
    return rows * s.gathered * 24


def head_kept(s: Sizes) -> list[Kept]:
    """Of the final norm and the head."""
    return [
        *(Kept(part="head", name=kept.name, shape=kept.shape, bytes=kept.bytes) for kept in _norm(s, "final norm")),
        Kept(part="head", name="input x", shape="[G, C] b", bytes=s.gathered * s.hidden * s.bytes),
        Kept(part="head", name="labels, normalisers, losses", shape="[G] int64, 2 fp32", bytes=s.gathered * 16),
    ]


def total(kept: list[Kept]) -> int:
    """Bytes."""
    return sum(tensor.bytes for tensor in kept)


def _norm(s: Sizes, name: str) -> list[Kept]:
    if s.device == "cpu":
        return [Kept(part="norms", name=f"{name}: input, normed", shape="2 [T, C] fp32, [T] fp32", bytes=s.tokens * (2 * s.hidden + 1) * 4)]
    return [Kept(part="norms", name=f"{name}: input", shape="[T, C] b, [T] fp32", bytes=s.tokens * (s.hidden * s.bytes + 4))]


def _lightning(s: Sizes) -> list[Kept]:
    qkv = 3 * s.gathered * s.width * s.bytes
    states = [Kept(part="states", name="states that enter", shape="[pieces, H, D, D] fp32", bytes=s.slots * s.state)]
    if s.device == "cpu":
        tensors = [Kept(part="mixer", name="q, k, v", shape="[G, 3 A] b", bytes=qkv)]
        block = max(FEWEST_TOKENS, BLOCK_NUMBERS // s.width)
        borders = max(-(-s.gathered // block) - s.slots, 0)
        states.append(Kept(part="states", name="a state a block", shape="[blocks - 1, H, D, D] fp32", bytes=borders * s.state))
    else:
        tensors = [Kept(part="mixer", name="q, k, v and their SiLU", shape="2 [G, 3 A] b", bytes=2 * qkv)]
        most = int(TRITON_STATES * 4 * s.gathered * s.width * s.bytes)
        states.append(Kept(part="states", name="states between segments, at most", shape="0.05 [G, 4 A] b", bytes=most))
    return [
        *tensors,
        *states,
        Kept(
            part="mixer",
            name="o, gate and the output norm's y",
            shape="3 [G, A] b, [G] fp32",
            bytes=s.gathered * (3 * s.width * s.bytes + 4),
        ),
    ]


def _softmax(s: Sizes) -> list[Kept]:
    copies = 2 if s.device == "cpu" and s.context == 1 else 1  # sdpa's documents are put together in another tensor
    return [
        Kept(part="mixer", name="q, k, v", shape="[G, A + 2 K] b", bytes=s.gathered * (s.width + 2 * s.key_value) * s.bytes),
        Kept(part="mixer", name="o", shape=f"{copies} [G, A] b", bytes=copies * s.gathered * s.width * s.bytes),
        Kept(part="mixer", name="log-sum-exp", shape="[G, H] fp32", bytes=s.gathered * s.heads * 4),
    ]
