# mypy: ignore-errors
"""Lightning attention in Triton: the device code. `lightning_triton.py` launches it and says which launch does what.

The packed row is cut into segments that never cross a document; a segment is walked in tiles of C tokens. With lam = exp(-s), a tile of
n tokens, 0-based rows i and j, S the state that enters the tile and dS the gradient of the state that leaves it (lightning_cpu.py):

    A_ij = (q_i . k_j) lam^(i-j),  i >= j                  G_ij = (do_i . v_j) lam^(i-j),  i >= j
    o_i  = sum_j A_ij v_j + lam^(i+1) q_i S                dq_i = sum_j G_ij k_j + lam^(i+1) do_i S^T
    S'   = lam^n S + sum_j lam^(n-1-j) k_j^T v_j           dk_j = sum_i G_ij q_i + lam^(n-1-j) v_j dS^T
    dS'  = lam^n dS + sum_i lam^(i+1) q_i^T do_i           dv_j = sum_i A_ij do_i + lam^(n-1-j) k_j dS

Rows beyond a segment's end are loaded as zeros and never stored. Products take the inputs' dtype and add in fp32 (fp32 inputs: `ieee`);
states are fp32. Offsets into tensors are 64-bit.
Legend: T tokens, H heads, D head size, C tile, BK and BV the part of D that one program holds of a state's rows and columns.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
VANISHES = tl.constexpr(128.0)  # 2^-128 is below fp32's least normal number: what decays further is nothing
COLUMNS = tl.constexpr(8)  # of int32 in the table of segments, named by _read
NO_SLOT = tl.constexpr(-1)  # also: no row of a table of documents' states


@triton.jit
def _bound(cu_seqlens, n, inside, tokens):
    """cu_seqlens[n], cut to the row: what it points at exists, whatever it holds."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + n, mask=inside, other=0), 0), tokens)


@triton.jit(do_not_specialize=["n_documents", "n_segments", "n_slots", "tokens", "segment_length"])  # they change from row to row
def cut_row(cu_seqlens, enters, leaves, segments, documents, n_documents, n_segments, n_slots, tokens, segment_length,
            BLOCK: tl.constexpr):  # fmt: skip
    """Writes the table of segments `[n_segments, 8]` and of documents `[n_documents, 2]` (first slot, number of segments).

    A program a document, and one more that marks the unused rest of the table as empty. A slot is where the state between two segments
    of one document is kept: a document of p segments has p - 1. No entry points outside the row or the slots, whatever cu_seqlens holds.
    `enters`, `leaves`: per document its row in the tables of initial and of end states, or -1.
    """
    n = tl.program_id(0)
    segment, slot = 0, 0
    for base in range(0, n, BLOCK):
        d = base + tl.arange(0, BLOCK)
        length = _bound(cu_seqlens, d + 1, d < n, tokens) - _bound(cu_seqlens, d, d < n, tokens)
        pieces = tl.cdiv(tl.maximum(length, 0), segment_length)
        segment += tl.sum(pieces).to(tl.int32)
        slot += tl.sum(tl.maximum(pieces - 1, 0)).to(tl.int32)
    start, end, count = 0, 0, n_segments - segment
    arrives, departs = -1, -1
    if n < n_documents:
        arrives, departs = tl.load(enters + n), tl.load(leaves + n)
        start = _bound(cu_seqlens, n, True, tokens)
        end = _bound(cu_seqlens, n + 1, True, tokens)
        count = tl.minimum(tl.cdiv(tl.maximum(end - start, 0), segment_length), tl.maximum(n_slots - slot, 0) + 1)
        tl.store(documents + 2 * n, slot)
        tl.store(documents + 2 * n + 1, count)
    for base in range(0, count, BLOCK):
        i = base + tl.arange(0, BLOCK)
        row = segments + (segment + i) * COLUMNS
        mine = (i < count) & (segment + i < n_segments)
        entering = tl.where((i > 0) & (slot + i <= n_slots), slot + i - 1, NO_SLOT)
        leaving = tl.where((i < count - 1) & (slot + i < n_slots), slot + i, NO_SLOT)
        first = start + i * segment_length
        tl.store(row, tl.where(n < n_documents, first, 0), mask=mine)
        tl.store(row + 1, tl.where(n < n_documents, tl.minimum(first + segment_length, end), 0), mask=mine)
        tl.store(row + 2, tl.where(n < n_documents, entering, NO_SLOT), mask=mine)
        tl.store(row + 3, tl.where(n < n_documents, leaving, NO_SLOT), mask=mine)
        tl.store(row + 4, arrives + i * 0, mask=mine)
        tl.store(row + 5, start + i * 0, mask=mine)
        tl.store(row + 6, end + i * 0, mask=mine)
        tl.store(row + 7, departs + i * 0, mask=mine)


@triton.jit
def _tile(pointer, first, end, stride, C: tl.constexpr, WIDTH: tl.constexpr):
    """Tokens first .. first + C - 1 (64-bit `first`) by WIDTH columns from `pointer`; zeros from token `end` on."""
    i = tl.arange(0, C)
    offsets = i.to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + first * stride + offsets, mask=(i < end - first)[:, None], other=0.0)


@triton.jit
def _write(pointer, first, end, stride: tl.constexpr, tile, C: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.arange(0, C)
    offsets = i.to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(pointer + first * stride + offsets, tile.to(pointer.dtype.element_ty), mask=(i < end - first)[:, None])


@triton.jit
def _power(rate, n):
    """lam^n, with rate = s log2(e)."""
    return tl.exp2(-rate * n.to(tl.float32))


@triton.jit
def _state(states, index, heads, h, D: tl.constexpr):
    """Where state `index` of head h begins in `[*, H, D, D]`."""
    return states + (index.to(tl.int64) * heads + h) * (D * D)


@triton.jit
def segment_states(k, v, slopes, segments, slots, ends, heads, stride_kt, stride_kh, stride_vt, stride_vh,
                   D: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   REVERSE: tl.constexpr, ENDS: tl.constexpr):  # fmt: skip
    """What each segment alone adds to the state that leaves it, into its slot; for a document's last one into its row of `ends`, if any.

    REVERSE: with (k, v) = (q, do), what it adds to the gradient of the state that enters it; for a document's first one into `ends`.
    """
    pid = tl.program_id(0)
    h, m = pid % heads, pid // heads
    row, column = tl.program_id(1) * BK, tl.program_id(2) * BV
    start, end = tl.load(segments + m * COLUMNS), tl.load(segments + m * COLUMNS + 1)
    slot = tl.load(segments + m * COLUMNS + (2 if REVERSE else 3))
    wanted = slot
    if ENDS:
        wanted = tl.maximum(slot, tl.load(segments + m * COLUMNS + (4 if REVERSE else 7)))
    if start == end or wanted < 0:
        return
    rate = tl.load(slopes + h) * LOG2_E
    reach = tl.minimum(VANISHES / tl.maximum(rate, 1e-30), (end - start).to(tl.float32)).to(tl.int32) + 1
    begin, stop = start, end
    if REVERSE:
        stop = tl.minimum(end, start + reach)
    else:
        begin = tl.maximum(start, end - reach)
    k += h.to(tl.int64) * stride_kh + row
    v += h.to(tl.int64) * stride_vh + column
    state = tl.zeros((BK, BV), tl.float32)
    i = tl.arange(0, C)
    for at in range(0, stop - begin, C):
        first = begin.to(tl.int64) + at
        k_CK = _tile(k, first, stop, stride_kt, C, BK)
        v_CV = _tile(v, first, stop, stride_vt, C, BV)
        token = begin + at + i
        distance = (token - start + 1) if REVERSE else (end - 1 - token)
        weight = _power(rate, tl.maximum(distance, 0))
        weighted = (v_CV.to(tl.float32) * weight[:, None]).to(v_CV.dtype)
        state = tl.dot(tl.trans(k_CK), weighted, acc=state, input_precision="ieee")
    place = (row + tl.arange(0, BK))[:, None] * D + (column + tl.arange(0, BV))[None, :]
    if slot >= 0:
        tl.store(_state(slots, slot, heads, h, D) + place, state)
    elif ENDS:
        tl.store(_state(ends, wanted, heads, h, D) + place, state)


@triton.jit(do_not_specialize=["segment_length", "tokens"])
def scan_states(slots, ends, slopes, cu_seqlens, documents, rows, heads, segment_length, tokens,
                D: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, REVERSE: tl.constexpr, ENDS: tl.constexpr):  # fmt: skip
    """Turns what each segment adds (segment_states) into the state between segments, from zero, document by document; in place.

    Forward: state behind segment p = what p adds + lam^length(p) state before it; ends[rows[n]] becomes document n's final state.
    REVERSE: the same from the last segment to the first; ends[rows[n]] becomes the gradient of document n's initial state.
    AHEAD states are on their way from memory at a time: one after the other, the wait for each would be the kernel's time.
    """
    pid = tl.program_id(0)
    h, n = pid % heads, pid // heads
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rate = tl.load(slopes + h) * LOG2_E
    slot, count = tl.load(documents + 2 * n), tl.load(documents + 2 * n + 1)
    decay = tl.exp2(-rate * segment_length)
    state = tl.zeros((BLOCK,), tl.float32)
    step = tl.full((), D * D, tl.int64) * heads  # a number that is 1 is a constant to the compiler, without `.to`
    first = slot + (count - 2 if REVERSE else 0)
    onward = -step if REVERSE else step
    pointers = slots + first * step + h * (D * D) + at
    for base in range(0, count - 1, AHEAD):
        arriving = ()
        for j in tl.static_range(AHEAD):
            arriving = arriving + (tl.load(pointers + j * onward, mask=at < tl.where(base + j < count - 1, D * D, 0), other=0.0),)
        for j in tl.static_range(AHEAD):
            here = at < tl.where(base + j < count - 1, D * D, 0)
            state = tl.where(here, state * decay + arriving[j], state)
            tl.store(pointers + j * onward, state, mask=here)
        pointers += AHEAD * onward
    if ENDS:
        row = tl.load(rows + n)
        if row >= 0:
            start, end = _bound(cu_seqlens, n, True, tokens), _bound(cu_seqlens, n + 1, True, tokens)
            last = segment_length if REVERSE else end - start - (count - 1) * segment_length
            pointers = ends + row * step + h * (D * D) + at
            if count > 0:
                state = tl.load(pointers) + state * tl.exp2(-rate * last)
            tl.store(pointers, state)  # zero for an empty document


@triton.jit
def _part(state, row, column, turned, D: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr):
    """Rows row .. row + DK - 1 and columns column .. column + BV - 1 of X, the state there or (`turned`) its transpose."""
    k, v = row + tl.arange(0, DK), column + tl.arange(0, BV)
    if turned:
        x_KV = tl.trans(tl.load(state + v[:, None] * D + k[None, :]))
    else:
        x_KV = tl.load(state + k[:, None] * D + v[None, :])
    return x_KV


@triton.jit
def _walk(a, b, c, out, stride_a, stride_b, stride_c, stride_out: tl.constexpr, slots, slot, given, distance, row, turned,
          rate, start, end, heads, h, column, D: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
          REVERSE: tl.constexpr, SLOTS: tl.constexpr, GIVEN: tl.constexpr):  # fmt: skip
    """Columns column .. column + BV - 1 of one segment's result; o, dq, dk and dv are all of this form, X `[D, BV]` the running state:

        forward  out_i = sum_{j<=i} (a_i . b_j) lam^(i-j) c_j + lam^(i+1) a_i X      X' = lam^n X + sum_j lam^(n-1-j) b_j^T c_j
        REVERSE  out_i = sum_{j>=i} (a_i . b_j) lam^(j-i) c_j + lam^(n-1-i) a_i X    X' = lam^n X + sum_j lam^(j+1) b_j^T c_j

    X begins as the state in `slot` (SLOTS; none if negative) plus row `row` of `given` over `distance` tokens (GIVEN; none if negative).
    `turned`: the states in memory are X's transposes. X is held as D / DK tensors of DK rows: fp32 products keep both factors in registers.
    """
    x = ()
    for s in tl.static_range(D // DK):
        x_KV = tl.zeros((DK, BV), tl.float32)
        if SLOTS:
            if slot >= 0:
                x_KV = _part(_state(slots, slot, heads, h, D), s * DK, column, turned, D, DK, BV)
        if GIVEN:
            if row >= 0:
                x_KV += _power(rate, distance) * _part(_state(given, row, heads, h, D), s * DK, column, turned, D, DK, BV)
        x = x + (x_KV,)
    i = tl.arange(0, C)
    tiles = tl.cdiv(end - start, C)
    for tile in range(0, tiles):
        at = (tiles - 1 - tile if REVERSE else tile) * C
        first = start.to(tl.int64) + at
        n = tl.minimum(end - start - at, C)
        left = (n - 1 - i).to(tl.float32)  # loop-varying on purpose: weights that do not change with the tile would be kept in registers
        since = tl.exp2(-rate * (n.to(tl.float32) - left))
        until = tl.exp2(-rate * tl.maximum(left, 0.0))
        read, add = (until, since) if REVERSE else (since, until)
        apart = (left[:, None] - left[None, :]) if REVERSE else (left[None, :] - left[:, None])
        decay_CC = tl.where(apart >= 0, tl.exp2(-rate * apart), 0.0)
        scores_CC = tl.zeros((C, C), tl.float32)
        out_CV = tl.zeros((C, BV), tl.float32)
        b_parts = ()
        for s in tl.static_range(D // DK):
            a_CK = _tile(a + s * DK, first, end, stride_a, C, DK)
            b_CK = _tile(b + s * DK, first, end, stride_b, C, DK)
            scores_CC = tl.dot(a_CK, tl.trans(b_CK), acc=scores_CC, input_precision="ieee")
            out_CV = tl.dot(a_CK, x[s].to(a_CK.dtype), acc=out_CV, input_precision="ieee")
            if DK == D:  # else it is loaded again: kept in parts, it would spill
                b_parts = b_parts + (b_CK,)
        c_CV = _tile(c, first, end, stride_c, C, BV)
        out_CV = tl.dot((scores_CC * decay_CC).to(c_CV.dtype), c_CV, acc=out_CV * read[:, None], input_precision="ieee")
        _write(out, first, end, stride_out, out_CV, C, BV)
        weighted = (c_CV.to(tl.float32) * add[:, None]).to(c_CV.dtype)
        y = ()
        for s in tl.static_range(D // DK):
            if DK == D:
                b_CK = b_parts[s]
            else:
                b_CK = _tile(b + s * DK, first, end, stride_b, C, DK)
            y = y + (tl.dot(tl.trans(b_CK), weighted, acc=x[s] * _power(rate, n), input_precision="ieee"),)
        x = y


@triton.jit
def _read(segments, m):
    """First token, end, slot entering, slot leaving; of its document: row of the state entering, first token, end, row of the leaving."""
    row = segments + m * COLUMNS
    first, end, entering, leaving = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return first, end, entering, leaving, tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)


@triton.jit
def outputs(q, k, v, o, slopes, segments, slots, initial, heads, stride_t, stride_h, stride_ot: tl.constexpr, stride_oh: tl.constexpr,
            D: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SLOTS: tl.constexpr, INITIAL: tl.constexpr):  # fmt: skip
    """o, from the state in each segment's slot and the documents' initial states (INITIAL)."""
    part, pid = tl.program_id(0) % (D // BV), tl.program_id(0) // (D // BV)
    h, m = (pid % heads).to(tl.int64), pid // heads
    start, end, entering, _, arrives, opened, _, _ = _read(segments, m)
    if start == end:
        return
    x, column, rate = h * stride_h, part * BV, tl.load(slopes + h) * LOG2_E
    _walk(q + x, k + x, v + x + column, o + h * stride_oh + column, stride_t, stride_t, stride_t, stride_ot,
          slots, entering, initial, start - opened, arrives, False,
          rate, start, end, heads, h, column, D, DK, BV, C, False, SLOTS, INITIAL)  # fmt: skip


@triton.jit
def query_gradient(q, k, v, do, dq, slopes, segments, slots, initial, heads,
                   stride_t, stride_h, stride_ot, stride_oh, stride_dt: tl.constexpr, stride_dh: tl.constexpr,
                   D: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   SLOTS: tl.constexpr, INITIAL: tl.constexpr):  # fmt: skip
    """dq, from the states that `outputs` used."""
    part, pid = tl.program_id(0) % (D // BV), tl.program_id(0) // (D // BV)
    h, m = (pid % heads).to(tl.int64), pid // heads
    start, end, entering, _, arrives, opened, _, _ = _read(segments, m)
    if start == end:
        return
    x, column, rate = h * stride_h, part * BV, tl.load(slopes + h) * LOG2_E
    _walk(do + h * stride_oh, v + x, k + x + column, dq + h * stride_dh + column, stride_ot, stride_t, stride_t, stride_dt,
          slots, entering, initial, start - opened, arrives, True,
          rate, start, end, heads, h, column, D, DK, BV, C, False, SLOTS, INITIAL)  # fmt: skip


@triton.jit
def key_value_gradient(q, k, v, do, dk, dv, slopes, segments, dslots, dfinal, heads,
                       stride_t, stride_h, stride_ot, stride_oh, stride_dt: tl.constexpr, stride_dh: tl.constexpr,
                       D: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                       SLOTS: tl.constexpr, FINAL: tl.constexpr):  # fmt: skip
    """dk and dv, from the gradient in each segment's slot and the final states' (FINAL).

    The programs of dk and dv of one segment and head run side by side: they read the same tokens, once from memory and then from L2.
    """
    part, pid = tl.program_id(0) % (2 * (D // BV)), tl.program_id(0) // (2 * (D // BV))
    h, m = (pid % heads).to(tl.int64), pid // heads
    start, end, _, leaving, _, _, closed, departs = _read(segments, m)
    if start == end:
        return
    x, y, column, rate = h * stride_h, h * stride_oh, (part % (D // BV)) * BV, tl.load(slopes + h) * LOG2_E
    if part < D // BV:
        a, b, c, out = k + x, q + x, do + y + column, dv
        stride_b, stride_c = stride_t, stride_ot
    else:
        a, b, c, out = v + x, do + y, q + x + column, dk
        stride_b, stride_c = stride_ot, stride_t
    _walk(a, b, c, out + h * stride_dh + column, stride_t, stride_b, stride_c, stride_dt,
          dslots, leaving, dfinal, closed - end, departs, part >= D // BV,
          rate, start, end, heads, h, column, D, DK, BV, C, True, SLOTS, FINAL)  # fmt: skip
