"""Lightning attention on a GPU, in Triton: two passes over a row that is cut into segments (design and floor: docs/kernels.md).

1. local_states: what each segment alone adds to the state (reads k, v), then a scan over the segments of each document.
2. outputs: o of each segment from the state that enters it.

Backward: the same first pass backwards over q and do for the state's gradient; dq from the forward's states, dk and dv from the gradients.
The four steps are public: sequence parallelism sends a rank's `ends` to others between them. What a state becomes over a document or a
segment of n tokens is the known exp(-s n), so that a state from elsewhere is added where it is used, without another scan.

Legend: T tokens of the packed row, H heads, D head size, N documents. Nothing here waits for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels import lightning_triton_kernels as kernels

HEAD_SIZES = (64, 128)
LONGEST_SEGMENT = 2048
STATES_SHARE = 0.1  # of the bytes of q, k, v and o, at most, for the forward's states and their gradients together
PROGRAMS = 2  # that one multiprocessor holds at a time
SCAN_BLOCK, SCAN_AHEAD = 1024, 8  # numbers of a state in one program of the scan, states it loads at a time
COLUMNS = 8  # of the table of segments


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the two passes are laid out: tokens of a tile, the part of D that a program holds, warps, stages of the load pipeline."""

    tokens: int
    inner: int
    """Rows of the state in one product: D, or less in fp32, whose products keep both factors in registers."""
    columns: int
    """Columns of the state, and of the result, in one program."""
    warps: int
    stages: int
    state_rows: int
    state_columns: int
    state_warps: int
    state_stages: int


def tiles(size: int, dtype: torch.dtype) -> Tiles:
    """The shipped configuration for a head size and dtype: none spills on sm_90 (benchmarks/kernel_resources.py shows what each takes)."""
    if dtype == torch.float32:
        return Tiles(
            tokens=16, inner=16, columns=32, warps=4, stages=1, state_rows=32, state_columns=32, state_warps=4, state_stages=1
        )  # fmt: skip
    columns, stages, state_warps = min(size, 64), 2 if size == 128 else 3, 8 if size == 128 else 4
    return Tiles(
        tokens=64, inner=size, columns=columns, warps=4, stages=stages,
        state_rows=size, state_columns=size, state_warps=state_warps, state_stages=3,
    )  # fmt: skip


def segment_length(*, rows: int, tokens: int, heads: int, size: int, dtype: torch.dtype, processors: int) -> int:
    """Tokens of a segment. The rule: as long as the programs of one launch still fill the chip.

    A launch has rows x segments x heads x (D / columns) programs, and a multiprocessor holds two. Where rows x heads x (D / columns) fill
    it alone, a segment is the whole row of `tokens`: a single pass, no states in memory. Else at most 2,048 tokens, in steps of 128, and
    never so short that the states between segments (fp32, forward and backward together) exceed a tenth of q, k, v and o.
    """
    wanted, parts = PROGRAMS * processors, size // tiles(size, dtype).columns
    if rows * heads * parts >= wanted:
        return max(tokens, 1)
    shortest = -(-2 * 4 * size * size // int(STATES_SHARE * 4 * size * dtype.itemsize * 128)) * 128
    fitting = rows * tokens * heads * parts // wanted // 128 * 128
    return max(shortest, min(fitting, LONGEST_SEGMENT))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A packed row cut into segments that never cross a document. Tables on the device; sizes are bounds known without asking it."""

    length: int
    tokens: int
    cu_seqlens: Tensor
    """int32 `[N + 1]`."""
    segments: Tensor
    """int32 `[slots + N, 8]` (kernels._read); unused ones are empty."""
    documents: Tensor
    """int32 `[N, 2]`: first slot, number of segments."""
    slots: int
    """Places for states between two segments of one document."""
    rows: int
    """Of a table of documents' states `[rows, H, D, D]`."""
    full: bool
    """Document n has row n: no row of the tables stays unwritten."""
    enters: Tensor
    """int32 `[N]`: the row of a document's initial state, and of that state's gradient; -1: zero, and not wanted."""
    leaves: Tensor
    """The same for its end state."""


def cut_row(
    cu_seqlens: Tensor, tokens: int, length: int, *, rows: int | None = None, enters: Tensor | None = None, leaves: Tensor | None = None
) -> Cut:
    """Cuts documents cu_seqlens[n] .. cu_seqlens[n + 1] - 1 (int32 `[N + 1]` on the device) into segments of at most `length` tokens.

    With rows, enters and leaves as in `Cut`, states of documents live in tables `[rows, H, D, D]`; else document n has row n.
    """
    documents, slots = len(cu_seqlens) - 1, max(tokens - 1, 0) // length
    full = rows is None or enters is None or leaves is None
    if rows is None or enters is None or leaves is None:
        rows, enters = documents, torch.arange(documents, dtype=torch.int32, device=cu_seqlens.device)
        leaves = enters
    cut = Cut(
        length=length,
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        segments=cu_seqlens.new_empty((slots + documents, COLUMNS)),
        documents=cu_seqlens.new_empty((documents, 2)),
        slots=slots,
        rows=rows,
        full=full,
        enters=enters,
        leaves=leaves,
    )
    kernels.cut_row[(documents + 1,)](
        cu_seqlens, enters, leaves, cut.segments, cut.documents, documents, len(cut.segments), slots, tokens, length, BLOCK=256
    )  # fmt: skip
    return cut


def over_documents(slopes_H: Tensor, cut: Cut) -> Tensor:
    """lam^length of every document, `[N, H, 1, 1]` fp32: what is left of its initial state in its end state."""
    return torch.exp(-slopes_H * cut.cu_seqlens.diff()[:, None])[..., None, None]


def local_states(
    k_THD: Tensor, v_THD: Tensor, slopes_H: Tensor, cut: Cut, layout: Tiles, *, ends: bool, reverse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(the state between segments, from zero initial states `[slots, H, D, D]`; with `ends` the state after each document that has a row
    in the table of end states `[rows, H, D, D]`; other rows are zero).

    reverse, called with (q, do): the same for gradients: of the state between segments, and of each document's initial state, both for
    end states of gradient zero. fp32.
    """
    _, heads, size = k_THD.shape
    slots = k_THD.new_empty((cut.slots, heads, size, size), dtype=torch.float32)
    make = k_THD.new_empty if cut.full else k_THD.new_zeros
    last = make((cut.rows, heads, size, size), dtype=torch.float32) if ends else None
    if not ends and not cut.slots:
        return slots, None
    grid = (len(cut.segments) * heads, size // layout.state_rows, size // layout.state_columns)
    kernels.segment_states[grid](
        k_THD, v_THD, slopes_H, cut.segments, slots, last if ends else slots, heads, *k_THD.stride()[:2], *v_THD.stride()[:2],
        D=size, BK=layout.state_rows, BV=layout.state_columns, C=layout.tokens, REVERSE=reverse, ENDS=ends,
        num_warps=layout.state_warps, num_stages=layout.state_stages,
    )  # fmt: skip
    kernels.scan_states[(len(cut.documents) * heads, size * size // SCAN_BLOCK)](
        slots, last if ends else slots, slopes_H, cut.cu_seqlens, cut.documents, cut.enters if reverse else cut.leaves,
        heads, cut.length, cut.tokens,
        D=size, BLOCK=SCAN_BLOCK, AHEAD=SCAN_AHEAD, REVERSE=reverse, ENDS=ends,
    )  # fmt: skip
    return slots, last


def outputs(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, slopes_H: Tensor, cut: Cut, layout: Tiles, slots: Tensor, initial: Tensor | None
) -> Tensor:
    """o `[T, H, D]`, from local_states' `slots` and the table of initial states `[rows, H, D, D]` fp32 (None: all zero)."""
    tokens, heads, size = q_THD.shape
    o = q_THD.new_empty((tokens, heads, size))
    kernels.outputs[(len(cut.segments) * heads * (size // layout.columns),)](
        q_THD, k_THD, v_THD, o, slopes_H, cut.segments, slots, _or(initial, slots), heads, *q_THD.stride()[:2],
        stride_ot=heads * size, stride_oh=size, D=size, DK=layout.inner, BV=layout.columns, C=layout.tokens,
        SLOTS=cut.slots > 0, INITIAL=initial is not None, num_warps=layout.warps, num_stages=layout.stages,
    )  # fmt: skip
    return o


def query_gradient(
    qkv: tuple[Tensor, Tensor, Tensor], do_THD: Tensor, slopes_H: Tensor, cut: Cut, layout: Tiles, slots: Tensor, initial: Tensor | None,
    dq_THD: Tensor,
) -> None:  # fmt: skip
    """Writes dq, from what `outputs` was given."""
    q, k, v = qkv
    _, heads, size = q.shape
    kernels.query_gradient[(len(cut.segments) * heads * (size // layout.columns),)](
        q, k, v, do_THD, dq_THD, slopes_H, cut.segments, slots, _or(initial, slots), heads, *q.stride()[:2], *do_THD.stride()[:2],
        stride_dt=dq_THD.stride(0), stride_dh=dq_THD.stride(1), D=size, DK=layout.inner, BV=layout.columns, C=layout.tokens,
        SLOTS=cut.slots > 0, INITIAL=initial is not None, num_warps=layout.warps, num_stages=layout.stages,
    )  # fmt: skip


def key_value_gradient(
    qkv: tuple[Tensor, Tensor, Tensor], do_THD: Tensor, slopes_H: Tensor, cut: Cut, layout: Tiles, dslots: Tensor, dfinal: Tensor | None,
    dk_THD: Tensor, dv_THD: Tensor,
) -> None:  # fmt: skip
    """Writes dk and dv, from the reverse local_states' `dslots` and the table of end states' gradients (None: all zero)."""
    q, k, v = qkv
    _, heads, size = q.shape
    kernels.key_value_gradient[(len(cut.segments) * heads * 2 * (size // layout.columns),)](
        q, k, v, do_THD, dk_THD, dv_THD, slopes_H, cut.segments, dslots, _or(dfinal, dslots), heads, *q.stride()[:2], *do_THD.stride()[:2],
        stride_dt=dk_THD.stride(0), stride_dh=dk_THD.stride(1), D=size, DK=layout.inner, BV=layout.columns, C=layout.tokens,
        SLOTS=cut.slots > 0, FINAL=dfinal is not None, num_warps=layout.warps, num_stages=layout.stages,
    )  # fmt: skip


def _or(states: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not read where there are no states."""
    return other if states is None else states


def lightning_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, slopes_H: Tensor, cu_seqlens: Tensor, initial: Tensor | None, *, rows: int, final: bool,
    length: int | None = None, layout: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(o `[T, H, D]`, with `final` the state after each document `[N, H, D, D]` fp32).

    q, k, v `[T, H, D]` of one dtype of bf16, fp16, fp32; cu_seqlens int32 `[N + 1]` on their device, of which `rows` are known to be of
    one length; initial `[N, H, D, D]`. `length` of a segment and `layout`: by the rules above where None.
    """
    tokens, heads, size = q_THD.shape
    length, layout = plan(
        rows=rows, tokens=tokens, heads=heads, size=size, dtype=q_THD.dtype, device=q_THD.device, length=length, layout=layout
    )
    with torch.cuda.device_of(q_THD):
        cut = cut_row(cu_seqlens, tokens, length)
    state = None if initial is None else initial.float().contiguous()
    o, last = _Attend.apply(*_alike(q_THD, k_THD, v_THD), slopes_H, state, cut, layout, final)
    return o, last


def plan(
    *, rows: int, tokens: int, heads: int, size: int, dtype: torch.dtype, device: torch.device, length: int | None, layout: Tiles | None
) -> tuple[int, Tiles]:
    """Length of a segment and layout for a packed row of `tokens`, by the rules above where None. ValueError where nothing runs."""
    _refuse(dtype, size, device)
    if length is None:
        length = segment_length(
            rows=rows, tokens=tokens // max(rows, 1), heads=heads, size=size, dtype=dtype, processors=_processors(device)
        )
    if layout is None:  # the interpreter has no registers to spare: there fp32 is laid out as bf16 on a GPU, which is ten times faster
        layout = tiles(size, torch.bfloat16 if triton.knobs.runtime.interpret else dtype)
    return length, layout


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied unless all have one stride and a contiguous last dimension."""
    if all(x.stride() == tensors[0].stride() and x.stride(-1) == 1 for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


class _Attend(torch.autograd.Function):
    """All steps of a row whose states nobody else needs in between."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial: Tensor | None, cut: Cut, layout: Tiles, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        with torch.cuda.device_of(q):
            slots, ends = local_states(k, v, slopes, cut, layout, ends=final)
            o = outputs(q, k, v, slopes, cut, layout, slots, initial)
            if ends is not None and initial is not None:
                ends += over_documents(slopes, cut) * initial
        ctx.save_for_backward(q, k, v, slopes, slots, initial)
        ctx.cut, ctx.layout = cut, layout
        ctx.set_materialize_grads(False)
        return o, ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, slots, initial = ctx.saved_tensors
        cut, layout, wanted = ctx.cut, ctx.layout, initial is not None and ctx.needs_input_grad[4]
        do = torch.zeros_like(q) if do is None else do if do.stride(-1) == 1 else do.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
        with torch.cuda.device_of(do):
            query_gradient((q, k, v), do, slopes, cut, layout, slots, initial, dq)
            dslots, dinitial = local_states(q, do, slopes, cut, layout, ends=wanted, reverse=True)
            key_value_gradient((q, k, v), do, slopes, cut, layout, dslots, dfinal, dk, dv)
            if dinitial is not None and dfinal is not None:
                dinitial += over_documents(slopes, cut) * dfinal
        return dq, dk, dv, None, dinitial, None, None, None


def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; under Triton's interpreter an H100's 132."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _refuse(dtype: torch.dtype, size: int, device: torch.device) -> None:
    """Raises ValueError where these kernels do not run."""
    interpreted = bool(triton.knobs.runtime.interpret)
    if size not in HEAD_SIZES or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"backend 'triton' was given {dtype} heads of {size}; it takes bf16, fp16 or fp32 heads of 64 or 128")
    if device.type != "cuda" and not interpreted:
        raise ValueError(f"backend 'triton' was given tensors on {device}; it needs a GPU, or TRITON_INTERPRET=1 before Python starts")
    if interpreted and dtype == torch.bfloat16:
        raise ValueError("backend 'triton' was given bf16 under TRITON_INTERPRET=1, which multiplies bf16 wrongly; use fp32 or fp16")
