"""Lightning attention over pieces: the local kernel around an exchange of states, forward and backward.

    forward    end states of the pieces -> begin -> what the caller does meanwhile -> finish -> outputs from the states that enter
    backward   gradients of those states -> begin (mirrored) -> the backward of that -> finish -> gradients of q, k and v

Autograd runs the nodes in reverse of the order in which forward made them, so that what ran between begin and finish runs there again.
The kernel comes from outside: `Steps`, stateless, so that what it keeps is saved where autograd saves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.collectives import Channel, Pending
from parallel.exchange import Exchange
from parallel.states import Flow

T = TypeVar("T")
Kept = tuple[Tensor, ...]


class Steps(Protocol):
    """The local kernel on this rank's tokens; states are `[slots, H, D, D]`, a slot for each piece."""

    def prepare(self, qkv: Tensor) -> Tensor:
        """What the other steps are given, differentiably."""
        ...

    def end_states(self, qkv: Tensor) -> tuple[Tensor, Kept]:
        """The state after each piece from a zero state before its document's local part, 0 where no rank goes on with it."""
        ...

    def outputs(self, qkv: Tensor, initial: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        """o `[T, H, D]`, from the states that enter."""
        ...

    def initial_gradient(self, qkv: Tensor, do: Tensor) -> tuple[Tensor, Kept]:
        """The gradient of the states that enter, by the outputs alone."""
        ...

    def gradients(self, qkv: Tensor, initial: Tensor, do: Tensor, d_ends: Tensor, kept: Kept, kept_back: Kept) -> Tensor:
        """The gradient of qkv by the outputs and the end states."""
        ...


@dataclass(frozen=True, kw_only=True)
class Passing:
    """How the states of one layer pass between ranks."""

    exchange: Exchange
    flow: Flow
    back: Flow
    """flow.mirrored()"""
    channel: Channel


def lightning_over_pieces(qkv: Tensor, steps: Steps, passing: Passing, meanwhile: Callable[[], T]) -> tuple[Tensor, T]:
    """(o `[T, H, D]` of this rank's tokens `qkv`, what `meanwhile` returns, which runs while states are on their way)."""
    shared = _Shared(steps, passing)
    prepared = steps.prepare(qkv)
    ends, *kept = _Ends.apply(prepared, shared)
    token = _Begin.apply(ends, shared)
    result = meanwhile()
    initial = _Finish.apply(token, shared)
    o: Tensor = _Outputs.apply(initial, prepared.detach(), shared, *kept)
    return o, result


class _Shared:
    """What the four nodes of one call hand to each other besides tensors."""

    def __init__(self, steps: Steps, passing: Passing) -> None:
        self.steps, self.passing = steps, passing
        self.pending: Pending | None = None
        self.states: Tensor | None = None
        self.outputs: tuple[Any, ...] = ()
        """(initial, do, kept, kept_back), left by the backward of _Outputs for that of _Ends."""

    def begin(self, states: Tensor, flow: Flow) -> None:
        self.states = states.contiguous()
        self.pending = self.passing.exchange.begin(self.states, flow, self.passing.channel)

    def finish(self, flow: Flow) -> Tensor:
        assert self.pending is not None and self.states is not None, "finish without begin"
        result = self.passing.exchange.finish(self.pending, self.states, flow, self.passing.channel)
        self.pending = self.states = None
        return result


class _Ends(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, shared: _Shared) -> tuple[Tensor, ...]:
        ends, kept = shared.steps.end_states(qkv)
        ctx.save_for_backward(qkv)
        ctx.shared = shared
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # no zeros for what was kept
        return ends, *kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_ends: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        (qkv,), shared = ctx.saved_tensors, ctx.shared
        initial, do, kept, kept_back = shared.outputs
        shared.outputs = ()
        return shared.steps.gradients(qkv, initial, do, d_ends, kept, kept_back), None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ends: Tensor, shared: _Shared) -> Tensor:
        ctx.shared = shared
        shared.begin(ends, shared.passing.flow)
        return ends.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        d_ends: Tensor = ctx.shared.finish(ctx.shared.passing.back)
        return d_ends.flip(0), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, shared: _Shared) -> Tensor:
        ctx.shared = shared
        return shared.finish(shared.passing.flow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_initial: Tensor) -> tuple[Tensor, None]:
        ctx.shared.begin(d_initial.flip(0), ctx.shared.passing.back)  # slots, too, are in the order of the flow
        return d_initial.new_zeros(()), None


class _Outputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, initial: Tensor, qkv: Tensor, shared: _Shared, *kept: Tensor) -> Tensor:
        o, kept_out = shared.steps.outputs(qkv, initial, kept)
        ctx.save_for_backward(initial, qkv, *kept_out)
        ctx.shared = shared
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        initial, qkv, *kept = ctx.saved_tensors
        d_initial, kept_back = ctx.shared.steps.initial_gradient(qkv, do)
        ctx.shared.outputs = (initial, do, tuple(kept), kept_back)
        return d_initial, None, None, *(None for _ in ctx.needs_input_grad[3:])
