"""The Triton kernels against the definition in fp64: compiled on a GPU, elsewhere interpreted (fp32: the interpreter's bf16 is wrong)."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimax_train.kernels import best_lightning_backend, lightning_attention, lightning_triton, lightning_triton_kernels
from minimax_train.kernels.lightning_triton import Tiles, segment_length, tiles
from minimax_train.model.lightning import decay_slopes

SLOPES = torch.tensor([0.917, 0.05, decay_slopes(64, 78, 80)[-1].item(), 0.0])  # fastest, middling, slowest of layer 78, none
LAYOUT = tiles(64, torch.bfloat16)  # what a GPU runs in bf16; the interpreter runs it in fp32
WHOLE = 1 << 20  # a segment longer than any row here: the single pass


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def starts(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def problem(lengths: list[int], size: int, device: str, dtype: torch.dtype = torch.float32, heads: int = 4) -> dict[str, Tensor]:
    """qkv `[T, H, 3, D]`, initial states, and weights of both results in the loss."""
    g = torch.Generator().manual_seed(sum(lengths))
    shapes = {"qkv": (sum(lengths), heads, 3, size), "initial": (len(lengths), heads, size, size)}
    shapes |= {"do": (sum(lengths), heads, size), "dfinal": shapes["initial"]}
    low = ("qkv", "do")
    return {name: torch.randn(s, generator=g).to(device, dtype if name in low else torch.float32) for name, s in shapes.items()}


def ours(p: dict[str, Tensor], lengths: list[int], length: int, layout: Tiles, slopes: Tensor = SLOPES) -> list[Tensor]:
    """o, final state, the gradients of qkv and of the initial states."""
    qkv, initial = p["qkv"].clone().requires_grad_(), p["initial"].clone().requires_grad_()
    cu_seqlens = starts(lengths, qkv.device.type)
    o, final = lightning_triton.lightning_attention(
        *qkv.unbind(2), slopes.to(qkv.device), cu_seqlens, initial, rows=1, final=True, length=length, layout=layout
    )
    assert final is not None
    return [o.detach(), final.detach(), *torch.autograd.grad([o, final], [qkv, initial], [p["do"], p["dfinal"]])]


def truth(p: dict[str, Tensor], lengths: list[int], slopes: Tensor = SLOPES) -> list[Tensor]:
    qkv, initial, do, dfinal = (p[name].cpu().double() for name in ("qkv", "initial", "do", "dfinal"))
    qkv.requires_grad_()
    initial.requires_grad_()
    q, k, v = qkv[None].unbind(3)
    o, final = lightning_attention(q, k, v, slopes, cu_seqlens=starts(lengths, "cpu"), initial_state=initial, backend="definition")
    return [o[0].detach(), final.detach(), *torch.autograd.grad([o[0], final], [qkv, initial], [do, dfinal])]


def agree(results: list[Tensor], exact: list[Tensor], tolerance: float = 1e-5, slopes: Tensor = SLOPES) -> None:
    """Head by head, and dq, dk, dv apart: what the fast heads lose must not hide behind the slow ones, whose numbers are far larger."""
    (o, final, dqkv, dinitial), (o_true, final_true, dqkv_true, dinitial_true) = results, exact
    pairs = [("o", o, o_true), ("final", final, final_true), ("dinitial", dinitial, dinitial_true)]
    pairs += [(f"d{name}", dqkv[:, :, i], dqkv_true[:, :, i]) for i, name in enumerate("qkv")]
    for name, a, b in pairs:
        assert torch.isfinite(a).all(), name
        for head, slope in enumerate(slopes.tolist()):
            error = relative(a[:, head], b[:, head])
            assert error < tolerance, f"{name}, slope {slope}: {error:.1e}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("length", [128, WHOLE], ids=["segments", "single pass"])
@pytest.mark.parametrize("lengths", [[1], [2, 0, 3], [63], [64], [0, 1, 64, 0], [40, 0, 1, 1, 200], [300, 1, 130]], ids=str)
def test_against_definition(lengths: list[int], length: int, device: str) -> None:
    """Among them documents of one and of several segments behind one of several: neither takes its state."""
    p = problem(lengths, 64, device)
    agree(ours(p, lengths, length, LAYOUT), truth(p, lengths))


@pytest.mark.usefixtures("poison")
def test_slow_decay_over_many_segments(device: str) -> None:
    """Nineteen segments of one document and three of the next, of 16 tokens: a state that is lost or decayed too much between two is seen.

    The scan loads SCAN_AHEAD states at a time; here it turns three times for the first document, forwards and backwards.
    """
    lengths, length = [300, 1, 40], 16
    assert lengths[0] // length > 2 * lightning_triton.SCAN_AHEAD
    slopes = SLOPES[[1, 2]]
    p = problem(lengths, 64, device, heads=2)
    agree(ours(p, lengths, length, LAYOUT, slopes), truth(p, lengths, slopes), slopes=slopes)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("size", "lengths"), [(64, [35, 1, 18]), (128, [20, 1])], ids=str)
def test_layout_of_fp32(size: int, lengths: list[int], device: str) -> None:
    """Tiles of 16 tokens in segments of 32, or of 18: one head, short rows; there are 16 to 64 products where a GPU's bf16 has one."""
    slopes = SLOPES[[1]]
    p = problem(lengths, size, device, heads=1)
    length = 32 if size == 64 else 18
    agree(ours(p, lengths, length, tiles(size, torch.float32), slopes), truth(p, lengths, slopes), slopes=slopes)


@pytest.mark.usefixtures("poison")
def test_heads_of_128(device: str) -> None:
    slopes = SLOPES[[0, 2]]
    p = problem([150, 61], 128, device, heads=2)
    agree(ours(p, [150, 61], 128, tiles(128, torch.bfloat16), slopes), truth(p, [150, 61], slopes), slopes=slopes)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("size", [64, 128])
def test_fp16(size: int, device: str) -> None:
    """Where a factor of a product is rounded to 16 bits; bf16 goes the same way. Slope 0 gathers 140 tokens."""
    lengths, slopes = [140, 20], SLOPES[[0, 3]]
    p = problem(lengths, size, device, torch.float16, heads=2)
    agree(ours(p, lengths, 128, tiles(size, torch.float16), slopes), truth(p, lengths, slopes), tolerance=2e-3, slopes=slopes)


@pytest.mark.usefixtures("poison")
def test_rows_of_a_batch(device: str) -> None:
    """The public call: three rows are three documents; separate q, k, v; only the final state is differentiated."""
    g = torch.Generator().manual_seed(0)
    results = []
    inputs = [torch.randn(3, 40, 4, 64, generator=g) for _ in range(3)]
    for backend, where in (("triton", device), ("definition", "cpu")):
        q, k, v = (x.to(where, torch.float64 if backend == "definition" else torch.float32).requires_grad_() for x in inputs)
        o, final = lightning_attention(q, k, v, SLOPES.to(where), backend=backend)
        results.append((o, final, *torch.autograd.grad(final.sum(), (k, v))))
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 1e-5


def test_no_tokens(device: str) -> None:
    empty = torch.zeros(1, 0, 4, 64, device=device)
    state = torch.ones(1, 4, 64, 64, device=device)
    o, final = lightning_attention(empty, empty, empty, SLOPES.to(device), initial_state=state, backend="triton")
    assert o.shape == empty.shape
    assert torch.equal(final, state)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=3).filter(any), head=st.integers(0, 3), data=st.data())
def test_splitting_anywhere_and_passing_the_state_on(device: str, lengths: list[int], head: int, data: st.DataObject) -> None:
    """Several documents, cut anywhere in one of them: o, the end states and every gradient are the whole row's."""
    n = data.draw(st.integers(0, len(lengths) - 1))
    split = data.draw(st.integers(0, lengths[n]))
    at, slopes = sum(lengths[:n]) + split, SLOPES[head : head + 1].to(device)
    p = problem(lengths, 64, device, heads=1)
    qkv, do, initial, dfinal = p["qkv"].requires_grad_(), p["do"], p["initial"].requires_grad_(), p["dfinal"]

    def call(part: slice, tokens: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
        o, final = lightning_triton.lightning_attention(
            *qkv[part].unbind(2), slopes, starts(tokens, device), states, rows=1, final=True, length=24, layout=LAYOUT
        )
        assert final is not None
        return o, final

    def with_gradients(o: Tensor, final: Tensor) -> list[Tensor]:
        return [o, final, *torch.autograd.grad([o, final], [qkv, initial], [do, dfinal])]

    whole = with_gradients(*call(slice(None), lengths, initial))
    head_o, before = call(slice(at), [*lengths[:n], split], initial[: n + 1])
    tail_o, behind = call(slice(at, None), [lengths[n] - split, *lengths[n + 1 :]], torch.cat((before[n:], initial[n + 1 :])))
    agree(with_gradients(torch.cat((head_o, tail_o)), torch.cat((before[:n], behind))), whole, slopes=slopes)


def test_steps_apart(device: str) -> None:
    """Sequence parallelism's order of the four steps, two ranks by hand: local states, what a neighbour sends, then outputs; and back."""
    lengths, split = [230], 130
    p = problem(lengths, 64, device) | {"initial": torch.zeros(1, 4, 64, 64, device=device)}
    exact = truth(p, lengths)
    slopes, dqkv = SLOPES.to(device), torch.empty_like(p["qkv"])
    parts = [p["qkv"][:split], p["qkv"][split:]]
    dos, grads = [p["do"][:split], p["do"][split:]], [dqkv[:split], dqkv[split:]]
    cuts = [lightning_triton.cut_row(starts([len(x)], device), len(x), 64) for x in parts]
    local = [
        lightning_triton.local_states(x[:, :, 1], x[:, :, 2], slopes, cut, LAYOUT, ends=True) for x, cut in zip(parts, cuts, strict=True)
    ]
    incoming = [None, local[0][1]]
    outputs = [
        lightning_triton.outputs(*x.unbind(2), slopes, cut, LAYOUT, slots, i)
        for x, cut, (slots, _), i in zip(parts, cuts, local, incoming, strict=True)
    ]
    assert relative(torch.cat(outputs), exact[0]) < 1e-5
    local_back = [
        lightning_triton.local_states(x[:, :, 0], do, slopes, cut, LAYOUT, ends=True, reverse=True)
        for x, do, cut in zip(parts, dos, cuts, strict=True)
    ]
    last = p["dfinal"]
    after_second = local_back[1][1]
    assert after_second is not None
    outgoing = [after_second + lightning_triton.over_documents(slopes, cuts[1]) * last, last]
    for x, do, cut, (slots, _), i, (dslots, _), d, g in zip(parts, dos, cuts, local, incoming, local_back, outgoing, grads, strict=True):
        qkv = x.unbind(2)
        lightning_triton.query_gradient(qkv, do, slopes, cut, LAYOUT, slots, i, g[:, :, 0])
        lightning_triton.key_value_gradient(qkv, do, slopes, cut, LAYOUT, dslots, d, g[:, :, 1], g[:, :, 2])
    assert relative(dqkv, exact[2]) < 1e-5


FAR = 1 << 30  # numbers; twice as many are one more than 32 bits count


@pytest.mark.parametrize(
    ("tokens", "heads", "apart", "length"),
    [(3, 1, (FAR, 512), WHOLE), (3, 1, (FAR, 512), 2), (2, 3, (512, FAR), 1)],
    ids=["inside a tile", "where a segment starts", "heads"],
)
def test_offsets_beyond_32_bits(tokens: int, heads: int, apart: tuple[int, int], length: int, device: str) -> None:
    """Tokens, or heads, 2^30 numbers apart, of everything that is read or written: the last lies 2^31 behind the first.

    q, k, v, do, o, dq, dk, dv lie side by side in one memory; what is between their rows is never touched.
    An offset of 32 bits points outside of it: interpreted, the process dies here, and the trace names this test.
    """
    last = (tokens - 1) * apart[0] + (heads - 1) * apart[1]
    memory = torch.empty(last + 8 * 64, dtype=torch.float16, device=device)
    places = memory.as_strided((tokens, heads, 8, 64), (*apart, 64, 1))
    q, k, v, do, o, dq, dk, dv = places.unbind(2)
    places[:, :, :4] = torch.randn(tokens, heads, 4, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    slopes, initial = torch.linspace(0.05, 0.2, heads), torch.zeros(1, heads, 64, 64)
    there, cut = slopes.to(device), lightning_triton.cut_row(starts([tokens], device), tokens, length)
    slots, _ = lightning_triton.local_states(k, v, there, cut, LAYOUT, ends=False)
    dslots, _ = lightning_triton.local_states(q, do, there, cut, LAYOUT, ends=False, reverse=True)
    lightning_triton_kernels.outputs[(len(cut.segments) * heads,)](  # lightning_triton.outputs makes o itself, dense
        q, k, v, o, there, cut.segments, slots, slots, heads, *q.stride()[:2], stride_ot=o.stride(0), stride_oh=o.stride(1),
        D=64, DK=64, BV=64, C=64, SLOTS=cut.slots > 0, INITIAL=False, num_warps=LAYOUT.warps, num_stages=LAYOUT.stages,
    )  # fmt: skip
    lightning_triton.query_gradient((q, k, v), do, there, cut, LAYOUT, slots, None, dq)
    lightning_triton.key_value_gradient((q, k, v), do, there, cut, LAYOUT, dslots, None, dk, dv)
    exact = truth({"qkv": places[:, :, :3], "do": do, "initial": initial, "dfinal": initial}, [tokens], slopes)
    assert relative(o, exact[0]) < 2e-3
    for name, ours, theirs in zip("qkv", (dq, dk, dv), exact[2].unbind(2), strict=True):
        assert relative(ours, theirs) < 2e-3, f"d{name}"


@pytest.mark.usefixtures("poison")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12), length=st.integers(1, 20))
@example(lengths=[2, 0, 1] * 100 + [300], length=1)  # 256 at a time: documents before one, segments of one, unused rows
def test_table_of_segments(device: str, lengths: list[int], length: int) -> None:
    """Every token in one segment, segments inside documents, a slot between two neighbours and nowhere else."""
    cut = lightning_triton.cut_row(starts(lengths, device), sum(lengths), length)
    expected, documents, slot, first = [], [], 0, 0
    for n, tokens in enumerate(lengths):
        pieces = -(-tokens // length)
        documents.append([slot, pieces])
        for i in range(pieces):
            start = first + i * length
            entering, leaving = (slot + i - 1 if i else -1), (slot + i if i < pieces - 1 else -1)
            expected.append([start, min(start + length, first + tokens), entering, leaving, n, first, first + tokens])
        slot, first = slot + max(pieces - 1, 0), first + tokens
    assert slot <= cut.slots
    assert cut.segments[: len(expected), :7].tolist() == expected
    assert all(start == end for start, end, *_ in cut.segments[len(expected) :].tolist())
    assert cut.documents.tolist() == documents


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rule_for_the_segment(size: int, dtype: torch.dtype) -> None:
    """Never more states than a tenth of q, k, v and o; a single pass where rows and heads fill the chip."""

    def rule(rows: int, tokens: int, heads: int) -> int:
        return segment_length(rows=rows, tokens=tokens, heads=heads, size=size, dtype=dtype, processors=132)

    for tokens, heads in itertools.product((1024, 8192, 65_536, 1 << 20), (1, 8, 64)):
        length = rule(1, tokens, heads)
        states = 2 * (tokens - 1) // length * heads * size * size * 4
        assert states <= 0.1 * 4 * tokens * heads * size * dtype.itemsize
        assert length >= tokens or length <= 2048
    assert rule(1, 1 << 20, 8) == 2048
    assert rule(64, 8192, 64) == 8192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "bf16, fp16 or fp32"),
        ({"size": 48}, "heads of 64 or 128"),
        ({"dtype": torch.bfloat16}, "TRITON_INTERPRET"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, device: str) -> None:
    if device == "cuda" and message == "TRITON_INTERPRET":
        pytest.skip("bf16 runs on a GPU")
    x = torch.zeros(1, 3, 2, change.get("size", 64), dtype=change.get("dtype", torch.float32), device=device)
    with pytest.raises(ValueError, match=message):
        lightning_attention(x, x, x, torch.ones(2, device=device), backend="triton")


def test_the_best_backend() -> None:
    cuda = torch.device("cuda")
    assert best_lightning_backend(torch.device("cpu"), torch.bfloat16, 128) == "cpu"
    assert best_lightning_backend(cuda, torch.bfloat16, 128) == "triton"
    assert best_lightning_backend(cuda, torch.bfloat16, 48) == best_lightning_backend(cuda, torch.float64, 64) == "definition"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_bf16_on_a_gpu() -> None:
    """8K tokens, 8 heads of 128, layer 78's slopes, three documents: against fp64, twice the same bits, and no wait for the device."""
    lengths = [5000, 1, 3191]
    slopes = decay_slopes(64, 78, 80)[-8:]
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 8192, 8, 3, 128, generator=g).bfloat16()
    do = torch.randn(1, 8192, 8, 128, generator=g).bfloat16()
    cu_seqlens, slopes_there, do_there = starts(lengths, "cuda"), slopes.cuda(), do.cuda()
    runs = []
    for _ in range(2):
        x = qkv.cuda().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            o, final = lightning_attention(*x.unbind(3), slopes_there, cu_seqlens=cu_seqlens)
            (dqkv,) = torch.autograd.grad(o, x, do_there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append((o, final, dqkv))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    exact = qkv.double().requires_grad_()
    o, final = lightning_attention(*exact.unbind(3), slopes, cu_seqlens=starts(lengths, "cpu"), backend="cpu")
    for a, b in zip(runs[0], (o, final, *torch.autograd.grad(o, exact, do.double())), strict=True):
        assert relative(a, b) < 6e-3
