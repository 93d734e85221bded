"""What is needed for a moment only, beside what is kept: by a layer's backward pass and the head's, at their largest.

Read from the code like kept.py, whose letters these are; V is this rank's part of the vocabulary. A figure is of all that lives at that
moment and is not kept: gradients on their way, copies that exchanges send and fill, products.
"""

from dataclasses import dataclass

from minimax_train.kernels.cross_entropy import CHUNK
from minimax_train.kernels.lightning_cpu import BLOCK_NUMBERS, FEWEST_TOKENS, LONGEST_CHUNK
from minimax_train.model.config import LayerKind
from minimax_train.planner.sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One moment of a backward pass."""

    name: str
    bytes: int
    freed: tuple[str, ...] = ()
    """Names of kept.Kept of the layer that are gone by then."""


NORM = ("experts_norm: input", "experts_norm: input, normed")
EXPERTS = (
    "input in fp32", "probabilities", "choices and weights", "order and inverse", "rows", "rows that came back", "gate and up", *NORM
)  # fmt: skip


def layer_moments(s: Sizes, kind: LayerKind) -> list[Moment]:
    """The moments that may be the peak of a layer's backward pass."""
    mixer = _lightning(s) if kind == "lightning" else _softmax(s)
    return [*_experts(s), *_norm(s), *mixer]


def _experts(s: Sizes) -> list[Moment]:
    """parallel.experts and SwiGLU: gradients of x (twice: the residual's and the sum's) and of the rows; then of one token group dx, SiLU,
    the product and the gradients of gate and up, and dy where it came from other ranks."""
    numbers = s.bytes
    waiting = (2 * s.tokens * s.hidden + s.sent * s.hidden) * numbers
    rows = s.received // s.token_groups
    arrived = 2 * rows * s.hidden * numbers if s.travels else 0  # dy as it arrives, and sorted by expert
    done = s.sent * s.hidden * numbers if s.token_groups > 1 else 0  # what earlier groups got back
    again = 2 * s.ffn if s.recompute == "selective" else 0
    inputs = rows * (s.hidden + 4 * s.ffn + again) * numbers + arrived
    weight = 3 * s.local_experts * s.hidden * s.ffn
    summed = weight * numbers if s.token_groups == 1 else weight * (4 + numbers)
    weights = rows * (s.hidden + 3 * s.ffn) * numbers + arrived + summed
    gone = ("rows that came back",)
    return [
        Moment(name="experts' gradients of rows", bytes=waiting + done + inputs + (weight * 4 if s.token_groups > 1 else 0), freed=gone),
        Moment(name="experts' gradients of weights", bytes=waiting + done + weights, freed=gone),
    ]


def _norm(s: Sizes) -> list[Moment]:
    """The norm before the experts, on a CPU a chain of fp32 operators."""
    gone = tuple(name for name in EXPERTS if name not in NORM)
    wide = 5 if s.device == "cpu" else 1
    return [Moment(name="norm's gradient", bytes=s.tokens * s.hidden * (3 * s.bytes + wide * 4), freed=gone)]


def _lightning(s: Sizes) -> list[Moment]:
    """The output norm (dy, dx, dgate), then the states' gradient beside do and d_qkv, then the projection's."""
    one, x = s.gathered * s.width * s.bytes, s.gathered * s.hidden * s.bytes
    residual = 2 * s.tokens * s.hidden * s.bytes
    output = Moment(name="lightning's output norm", bytes=residual + 3 * one, freed=EXPERTS)
    gone = (*EXPERTS, "o, gate and the output norm's y")
    projected = (2 if s.device == "cuda" else 1) * 3 * one
    scratch = lightning_scratch(s) if s.device == "cpu" else int(0.05 * 4 * one)
    states = (4 * s.slots + (s.slots * s.context if s.context > 1 else 0)) * s.state
    mixing = Moment(name="lightning attention's gradient", bytes=residual + x // s.tensor + one + projected + scratch + states, freed=gone)
    weight = 3 * s.hidden * s.width * s.bytes
    projection = Moment(name="gradient of q, k, v's projection", bytes=residual + 3 * one + 2 * x + weight, freed=gone)
    return [output, mixing, projection]


def lightning_scratch(s: Sizes) -> int:
    """kernels/lightning_cpu.py, backward: seven tensors of a block's rows, its scores, states, their gradients and a copy in b."""
    chunk = LONGEST_CHUNK if s.bytes == 2 else LONGEST_CHUNK // 2
    most = max(1, FEWEST_TOKENS // chunk, BLOCK_NUMBERS // (chunk * s.width))
    n = min(most, -(-s.gathered // chunk))
    rows = n * chunk * (7 * s.width + s.heads * chunk) * s.bytes
    decays = 2 * n * chunk * max(s.width, s.heads * chunk) * 4 if s.bytes == 2 else 0  # times fp32 decays, in fp32 and then rounded
    return rows + decays + 2 * (n + 1) * s.state + n * s.state * s.bytes // 4


def _softmax(s: Sizes) -> list[Moment]:
    """do, dq, dk, dv; the ring sums them in fp32, and holds keys and values of two hops and the gradients of one."""
    one, other = s.gathered * s.width, 2 * s.gathered * s.key_value
    residual = 2 * s.tokens * s.hidden * s.bytes
    bytes_ = residual + (2 * one + other) * s.bytes
    if s.context > 1:
        bytes_ += (one + other) * (4 if s.bytes == 2 else 0) + one * s.bytes + 3 * other * s.bytes + other * 4
    elif s.device == "cpu":
        bytes_ += one * s.bytes  # the documents' parts, put together
    return [Moment(name="softmax attention's gradient", bytes=bytes_, freed=EXPERTS)]


def head_moment(s: Sizes) -> Moment:
    """kernels/cross_entropy.py, backward: gradients of x and of the head in fp32, a chunk of logits, and the chunk before's gradient."""
    rows, weight = min(CHUNK, s.gathered), s.vocabulary * s.hidden
    wide = 4 if s.fp32_head else s.bytes
    logits = rows * s.vocabulary * ((12 if s.device == "cpu" else wide) + (wide if s.gathered > CHUNK else 0))
    product = rows * s.vocabulary * wide + weight * wide
    copy = weight * 4 if s.fp32_head and s.bytes == 2 else 0
    largest = max(logits, product, weight * s.bytes if s.bytes == 2 else 0)
    return Moment(name="head's gradient", bytes=s.gathered * s.hidden * s.bytes + weight * 4 + largest + copy)
