"""The steps of lightning attention that sequence parallelism exchanges states between: a row cut over ranks, here in one process.

Every backend against the uncut row by the definition in fp64; the exchange is lam^n times a state, in plain torch.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minimax_train.kernels import lightning_attention
from minimax_train.kernels.lightning_steps import LocalDocuments, Steps, lightning_steps
from minimax_train.kernels.lightning_triton import tiles
from minimax_train.kernels.lightning_triton_steps import TritonSteps
from minimax_train.model.lightning import decay_slopes

SLOW = torch.tensor([0.917, 0.05, decay_slopes(64, 78, 80)[-1].item(), 0.0])  # fastest, middling, slowest of layer 78, none
FAST = torch.tensor([0.917, 2.0, 30.0, 5.0])  # nothing is left after 114 tokens: the end states skip the rest
Run = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of documents, and the runs of it that each rank holds; together all of it, each rank's in order."""

    lengths: list[int]
    ranks: list[list[Run]]
    slopes: Tensor = SLOW

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def documents(self) -> list[Run]:
        ends = list(itertools.accumulate(self.lengths))
        return [(end - n, end) for n, end in zip(self.lengths, ends, strict=True)]


def halves(*cuts: int) -> list[list[Run]]:
    """One run a rank, cut there."""
    return [[run] for run in itertools.pairwise(cuts)]


CASES = {
    "one rank": Case(lengths=[90, 0, 40, 1], ranks=halves(0, 131)),  # no state comes or goes: a layer without context parallelism
    "one rank, all documents short": Case(lengths=[9, 0, 1, 20], ranks=halves(0, 30)),
    "one document, three ranks": Case(lengths=[260], ranks=halves(0, 70, 180, 260)),
    "documents, cuts anywhere": Case(lengths=[5, 1, 1, 90, 0, 40, 1, 70, 60], ranks=halves(0, 61, 150, 268)),
    "cuts on documents": Case(lengths=[64, 33, 1, 70], ranks=halves(0, 97, 98, 168)),
    "a rank of one token": Case(lengths=[30, 40, 3], ranks=halves(0, 33, 34, 73)),
    "zigzag, one document": Case(lengths=[240], ranks=[[(0, 50), (170, 240)], [(50, 110), (110, 170)]]),
    "zigzag, documents": Case(lengths=[70, 1, 45, 0, 17, 80, 1], ranks=[[(0, 40), (133, 214)], [(40, 71), (71, 133)]]),
    "zigzag, three ranks": Case(
        lengths=[100, 9, 120], ranks=[[(0, 30), (180, 229)], [(30, 75), (150, 180)], [(75, 109), (109, 150)]]
    ),
    "fast decay": Case(lengths=[320, 20], ranks=halves(0, 150, 340), slopes=FAST),
}  # fmt: skip

ONE_PASS = ("one rank", "documents, cuts anywhere", "zigzag, three ranks")  # nothing, and one or two documents, enter and leave


def local_documents(case: Case, runs: list[Run], device: str) -> LocalDocuments:
    """Documents cut to the runs; what enters run i has slot i, what leaves it slot i from the end."""
    bounds, enters, leaves = [0], [-1] * len(runs), [-1] * len(runs)
    for i, (start, stop) in enumerate(runs):
        for first, end in case.documents():
            if max(first, start) < min(end, stop) or (first == end and start <= first < stop):
                if first < start:
                    enters[i] = len(bounds) - 1
                if end > stop:
                    leaves[-1 - i] = len(bounds) - 1
                bounds.append(bounds[-1] + min(end, stop) - max(first, start))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    return LocalDocuments(cu_seqlens=cu_seqlens, bounds=bounds, enters=tuple(enters), leaves=tuple(leaves))


def make_steps(case: Case, documents: LocalDocuments, backend: str, like: Tensor) -> Steps:
    size = like.shape[-1]
    return lightning_steps(case.slopes.to(like.device), documents, backend=backend, dtype=like.dtype, head_size=size)


def pass_on(case: Case, local: list[LocalDocuments], sums: list[Tensor], *, backwards: bool) -> list[Tensor]:
    """The exchange: per rank the states `[slots, H, D, D]` that come to it, NaN where none does, by a walk over all runs in order."""
    arrived = [torch.full_like(s, float("nan")) for s in sums]
    order = sorted((run, rank, i) for rank, runs in enumerate(case.ranks) for i, run in enumerate(runs))
    carried = torch.zeros_like(sums[0][0])
    for _, rank, i in reversed(order) if backwards else order:
        slots = (i, len(case.ranks[rank]) - 1 - i)
        came, went = (local[rank].enters[slots[0]], local[rank].leaves[slots[1]])[:: -1 if backwards else 1]
        to, of = slots[:: -1 if backwards else 1]
        if came >= 0:
            arrived[rank][to] = carried
        if went >= 0:
            first, end = local[rank].span(went)
            through = torch.exp(-case.slopes.to(carried) * (end - first))[:, None, None] * carried if came == went else 0
            carried = sums[rank][of] + through
    return arrived


def parts(x: Tensor, runs: list[Run]) -> Tensor:
    return torch.cat([x[start:stop] for start, stop in runs])


def by_steps(case: Case, qkv: Tensor, do: Tensor, steps: Sequence[Steps], local: list[LocalDocuments]) -> tuple[Tensor, Tensor]:
    """o `[T, H, D]` and the gradient of qkv `[T, H, 3, D]` before its SiLU, of all ranks, in the order of the whole row."""
    raw = [parts(qkv, runs).requires_grad_() for runs in case.ranks]
    ready = [s.prepare(x) for s, x in zip(steps, raw, strict=True)]
    x, dos = [y.detach() for y in ready], [parts(do, runs) for runs in case.ranks]
    with torch.no_grad():
        ends, kept = zip(*(s.end_states(y) for s, y in zip(steps, x, strict=True)), strict=True)
        initial = pass_on(case, local, list(ends), backwards=False)
        o, kept_outputs = zip(*(s.outputs(*a) for s, *a in zip(steps, x, initial, kept, strict=True)), strict=True)
        back, kept_gradient = zip(*(s.initial_gradient(*a) for s, *a in zip(steps, x, dos, strict=True)), strict=True)
        d_ends = pass_on(case, local, list(back), backwards=True)
        d = [s.gradients(*a) for s, *a in zip(steps, x, initial, dos, d_ends, kept_outputs, kept_gradient, strict=True)]
    for sums, slots in [*zip(ends, (a.leaves for a in local), strict=True), *zip(back, (a.enters for a in local), strict=True)]:
        assert not any(sums[i].any() for i, document in enumerate(slots) if document < 0)
    dqkv = [torch.autograd.grad(y, r, g)[0] for y, r, g in zip(ready, raw, d, strict=True)]
    whole_o, whole_d = torch.full_like(do, float("nan")), torch.full_like(qkv, float("nan"))
    for rank, runs in enumerate(case.ranks):
        at = 0
        for start, stop in runs:
            whole_o[start:stop], whole_d[start:stop] = o[rank][at : at + stop - start], dqkv[rank][at : at + stop - start]
            at += stop - start
    return whole_o, whole_d


def truth(case: Case, qkv: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
    x = qkv.cpu().double().requires_grad_()
    q, k, v = torch.nn.functional.silu(x)[None].unbind(3)
    starts = torch.tensor([0, *itertools.accumulate(case.lengths)])
    o, _ = lightning_attention(q, k, v, case.slopes, cu_seqlens=starts, backend="definition")
    return o[0].detach(), torch.autograd.grad(o[0], x, do.cpu().double())[0]


def problem(case: Case, size: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(case.tokens)
    shapes = ((case.tokens, 4, 3, size), (case.tokens, 4, size))
    qkv, do = (torch.randn(shape, generator=g).to(device, dtype) for shape in shapes)
    return qkv, do


def agree(case: Case, results: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Head by head: a state that the slow heads lose must not hide behind the others. dq, dk, dv apart."""
    (o, d), (o_true, d_true) = ((x.detach().double().cpu() for x in pair) for pair in (results, exact))
    for name, ours, theirs in (("o", o, o_true), *((f"d{n}", d[:, :, i], d_true[:, :, i]) for i, n in enumerate("qkv"))):
        for head, slope in enumerate(case.slopes.tolist()):
            error = (ours[:, head] - theirs[:, head]).norm() / theirs[:, head].norm()
            assert error < tolerance, f"{name}, slope {slope}: {error:.1e}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["bf16", "fp32", "fp64"]
)
@pytest.mark.parametrize("backend", ["definition", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_cut_row_is_the_whole_row(name: str, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    case = CASES[name]
    qkv, do = problem(case, 16, dtype)
    local = [local_documents(case, runs, "cpu") for runs in case.ranks]
    steps = [make_steps(case, documents, backend, do) for documents in local]
    agree(case, by_steps(case, qkv, do, steps, local), truth(case, qkv, do), tolerance)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), ranks=st.integers(1, 3), data=st.data())
def test_any_zigzag(lengths: list[int], ranks: int, data: st.DataObject) -> None:
    """Two runs a rank, empty ones too, cut anywhere."""
    cuts = data.draw(st.lists(st.integers(0, sum(lengths)), min_size=2 * ranks - 1, max_size=2 * ranks - 1))
    runs = list(itertools.pairwise([0, *sorted(cuts), sum(lengths)]))
    case = Case(lengths=lengths, ranks=[[runs[r], runs[-1 - r]] for r in range(ranks)])
    qkv, do = problem(case, 4, torch.float64)
    local = [local_documents(case, runs, "cpu") for runs in case.ranks]
    steps = [make_steps(case, documents, "cpu", do) for documents in local]
    for ours, theirs in zip(by_steps(case, qkv, do, steps, local), truth(case, qkv, do), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # slope 30: what a mask then leaves out
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("name", "length"),
    [
        *(pytest.param(name, 48, id=f"{name}-segments") for name in CASES),
        *(pytest.param(name, None, id=f"{name}-single pass", marks=() if name in ONE_PASS else pytest.mark.slow) for name in CASES),
    ],
)
def test_triton(name: str, length: int | None, device: str) -> None:
    """Several segments a document, and by the rule, which here is one.

    Slow: rows in a single pass whose documents enter and leave as those of ONE_PASS do; the interpreter takes seconds for each.
    """
    case = CASES[name]
    qkv, do = problem(case, 64, torch.float32, device)
    local = [local_documents(case, runs, device) for runs in case.ranks]
    layout = tiles(64, torch.bfloat16)
    steps = [
        TritonSteps.of(case.slopes.to(device), documents, dtype=do.dtype, head_size=64, length=length, layout=layout) for documents in local
    ]
    agree(case, by_steps(case, qkv, do, steps, local), truth(case, qkv, do), 1e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("slopes", [SLOW, FAST], ids=["slow", "fast"])
@pytest.mark.parametrize("ranks", [[[(0, 230), (590, 800)], [(230, 420), (420, 590)]], halves(0, 800)], ids=["zigzag", "one rank"])
def test_many_blocks(ranks: list[list[Run]], slopes: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local rows over several blocks of the CPU's scratch, in the sums of the end states too."""
    from minimax_train.kernels import lightning_cpu

    monkeypatch.setattr(lightning_cpu, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(lightning_cpu, "FEWEST_TOKENS", 64)
    case = Case(lengths=[200, 500, 1, 99], ranks=ranks, slopes=slopes)
    qkv, do = problem(case, 16, torch.float32)
    local = [local_documents(case, runs, "cpu") for runs in case.ranks]
    steps = [make_steps(case, documents, "cpu", do) for documents in local]
    agree(case, by_steps(case, qkv, do, steps, local), truth(case, qkv, do), 1e-5)


@pytest.mark.parametrize("slope", [0.0, 1e-6, 0.004, 0.917])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skipped_tokens_weigh_nothing(slope: float, dtype: torch.dtype) -> None:
    """The first token that the CPU's end states leave out has weight 0.0, and not many that they read have."""
    from minimax_train.kernels.lightning_cpu import reach

    slopes, tokens = torch.tensor([30.0, slope]), 1_000_000
    n = reach(slopes, dtype, tokens)
    weights = torch.exp(-slopes[1].to(dtype) * torch.tensor([n, 0.95 * n], dtype=dtype))
    assert n == tokens if slope < 1e-3 else weights[0] == 0 < weights[1]


class Allocations(TorchDispatchMode):
    """The most bytes of any storage that an operation inside the `with` returns."""

    most = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))  # type: ignore[operator]
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self.most = max(self.most, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("backend", "documents", "heads"), [("cpu", 3000, 2), ("triton", 60, 1)])
def test_many_documents_have_no_states(backend: str, documents: int, heads: int, device: str) -> None:
    """One document arrives and one goes on: nothing larger than the row itself, and nothing kept of documents.

    Fewer documents in Triton: its interpreter takes seconds for them.
    """
    size, device = 64, device if backend == "triton" else "cpu"
    bounds = list(itertools.accumulate([0, 3, 1, 1, *[2] * (documents - 3)]))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    local = LocalDocuments(cu_seqlens=cu_seqlens, bounds=bounds, enters=(0, -1), leaves=(-1, documents - 1))
    qkv = torch.randn(bounds[-1], heads, 3, size, device=device)
    with Allocations() as seen:
        steps = lightning_steps(SLOW[:heads].to(device), local, backend=backend, dtype=torch.float32, head_size=size)
        ends, kept = steps.end_states(qkv)
        o, kept_outputs = steps.outputs(qkv, ends, kept)
        back, kept_gradient = steps.initial_gradient(qkv, o)
        steps.gradients(qkv, ends, o, back, kept_outputs, kept_gradient)
    assert seen.most == qkv.nbytes < 4 * documents * heads * size * size / 10
    assert sum(x.numel() for x in (*kept, *kept_outputs, *kept_gradient)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bounds": [0, 4]}, "cu_seqlens"),
        ({"bounds": [1, 4, 9]}, "bounds"),
        ({"bounds": [0, 5, 4]}, "bounds"),
        ({"enters": (2, -1)}, "enters"),
        ({"enters": (0, 0)}, "enters"),
        ({"leaves": (0,)}, "leaves"),
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, "int32"),
    ],
)
def test_bad_documents(change: dict[str, object], message: str) -> None:
    good = {"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32), "bounds": [0, 4, 9], "enters": (0, -1), "leaves": (-1, -1)}
    with pytest.raises(ValueError, match=message):
        LocalDocuments(**good | change)  # type: ignore[arg-type]


def test_bad_backend() -> None:
    local = LocalDocuments(cu_seqlens=torch.zeros(1, dtype=torch.int32), bounds=[0], enters=(), leaves=())
    with pytest.raises(ValueError, match="magic"):
        lightning_steps(SLOW, local, backend="magic", dtype=torch.float32, head_size=64)


@pytest.mark.parametrize("backend", ["definition", "cpu", "triton"])
def test_no_tokens(backend: str, device: str) -> None:
    device = device if backend == "triton" else "cpu"
    starts = torch.zeros(2, dtype=torch.int32, device=device)
    local = LocalDocuments(cu_seqlens=starts, bounds=[0, 0], enters=(0, -1), leaves=(-1, 0))
    steps = lightning_steps(SLOW.to(device), local, backend=backend, dtype=torch.float32, head_size=64)
    qkv, state = torch.zeros(0, 4, 3, 64, device=device), torch.ones(2, 4, 64, 64, device=device)
    ends, kept = steps.end_states(qkv)
    o, kept_outputs = steps.outputs(qkv, state, kept)
    back, kept_gradient = steps.initial_gradient(qkv, o)
    assert not ends.any()
    assert not back.any()
    assert steps.gradients(qkv, state, o, state, kept_outputs, kept_gradient).shape == qkv.shape
