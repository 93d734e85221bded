"""What the steps of lightning attention ask of a GPU: its launches, its memory, and never a wait. Mostly on tensors without memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimax_train.kernels import lightning_triton, lightning_triton_kernels
from minimax_train.kernels.lightning_steps import LocalDocuments, lightning_steps

HEADS, SIZE, DOCUMENTS, TOKENS = 4, 64, 5, 20_000
STATE = 4 * HEADS * SIZE * SIZE
NAMES = ("cut_row", "segment_states", "scan_states", "outputs", "query_gradient", "key_value_gradient")
SWITCHES = ("ENDS", "INITIAL", "FINAL", "SLOTS", "REVERSE")


class Launches:
    """Stands where a kernel stands; launching it notes its name and which of its switches are on."""

    def __init__(self, name: str, noted: list[tuple[str, ...]]) -> None:
        self.name, self.noted = name, noted

    def __getitem__(self, grid: object) -> "Launches":
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        self.noted.append((self.name, *(switch for switch in SWITCHES if kwargs.get(switch))))


class Memory(TorchDispatchMode):
    """Bytes of all storages that operations make, and the operations between a device and the host."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.waits = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        before, after = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        if len({x.device.type for x in (*before, *after) if x.dim()}) > 1:
            self.waits.append(str(func))
        known = {x.untyped_storage()._cdata for x in before}
        self.bytes += sum(x.untyped_storage().nbytes() for x in after if x.untyped_storage()._cdata not in known)
        return result


class Numbers(TorchFunctionMode):
    """Calls that bring numbers of the host to the device, or back: each is a copy that a host waits for, and invisible to Memory."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = list[str]()

    def __torch_function__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = func.__name__
        indexed = name in ("__getitem__", "__setitem__") and any(isinstance(x, list) for x in tree_leaves(args[1], is_leaf=is_list))
        if indexed or name in ("tensor", "as_tensor", "new_tensor", "item", "tolist", "__bool__", "__int__", "__float__"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def is_list(x: object) -> bool:
    return isinstance(x, list)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What is launched, on tensors that pass for a GPU's."""
    noted: list[tuple[str, ...]] = []
    monkeypatch.setattr(lightning_triton, "_refuse", lambda *_: None)
    for name in NAMES:
        monkeypatch.setattr(lightning_triton_kernels, name, Launches(name, noted))
    return noted


@contextmanager
def watched() -> Iterator[Memory]:
    """Nothing inside the `with` makes a host wait for a device."""
    with torch.device("meta"), Numbers() as numbers, Memory() as memory:
        yield memory
    assert memory.waits + numbers.waits == []


def by_steps(qkv: Tensor, cu_seqlens: Tensor, enters: tuple[int, ...], leaves: tuple[int, ...]) -> list[int]:
    """A forward and a backward; the bytes of the states that go out."""
    bounds = [n * TOKENS // DOCUMENTS for n in range(DOCUMENTS + 1)]
    documents = LocalDocuments(cu_seqlens=cu_seqlens, bounds=bounds, enters=enters, leaves=leaves)
    steps = lightning_steps(qkv.new_empty(HEADS), documents, backend="triton", dtype=qkv.dtype, head_size=SIZE)
    ends, kept = steps.end_states(qkv)
    o, kept = steps.outputs(qkv, ends, kept)
    back, kept_gradient = steps.initial_gradient(qkv, o)
    steps.gradients(qkv, ends, o, back, kept, kept_gradient)
    return [ends.nbytes, back.nbytes]


def plain(qkv: Tensor, cu_seqlens: Tensor) -> None:
    """The same of lightning_attention, without states of documents."""
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    o, _ = lightning_triton.lightning_attention(q, k, v, qkv.new_empty(HEADS), cu_seqlens, None, rows=1, final=False)
    torch.autograd.grad(o, (q, k, v), o.detach())


@pytest.mark.parametrize("tokens_of_a_segment", [None, TOKENS], ids=["segments", "single pass"])
@pytest.mark.parametrize("slots", [0, 2])
def test_without_other_ranks_they_are_the_plain_operator(
    slots: int, tokens_of_a_segment: int | None, launches: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same launches in the same forms; of memory only the zeros that go out, a state a slot and direction."""
    if tokens_of_a_segment is not None:
        monkeypatch.setattr(lightning_triton, "segment_length", lambda **_: tokens_of_a_segment)
    qkv = torch.empty(TOKENS, HEADS, 3, SIZE, device="meta")
    cu_seqlens = torch.empty(DOCUMENTS + 1, dtype=torch.int32, device="meta")
    with watched() as seen:
        plain(qkv, cu_seqlens)
    expected, memory = list(launches), seen.bytes
    launches.clear()
    with watched() as seen:
        sent = by_steps(qkv, cu_seqlens, (-1,) * slots, (-1,) * slots)
    assert sorted(launches) == sorted(expected)
    assert len(launches) == (8 if tokens_of_a_segment is None else 4)
    assert sent == [slots * STATE, slots * STATE]
    assert seen.bytes - memory - sum(sent) <= 4 * (2 * DOCUMENTS + HEADS)  # the tables of documents


def test_what_another_rank_adds(launches: list[tuple[str, ...]]) -> None:
    """One document enters and one leaves: the same launches, now with their states; no wait for the tables either."""
    qkv = torch.empty(TOKENS, HEADS, 3, SIZE, device="meta")
    with watched():
        by_steps(qkv, torch.empty(DOCUMENTS + 1, dtype=torch.int32, device="meta"), (0, -1), (-1, DOCUMENTS - 1))
    assert launches == [
        ("cut_row",),
        ("segment_states", "ENDS"),
        ("scan_states", "ENDS"),
        ("outputs", "INITIAL", "SLOTS"),
        ("segment_states", "ENDS", "REVERSE"),
        ("scan_states", "ENDS", "REVERSE"),
        ("query_gradient", "INITIAL", "SLOTS"),
        ("key_value_gradient", "FINAL", "SLOTS"),
    ]


@pytest.mark.usefixtures("poison")
def test_the_same_bits_as_the_plain_operator(device: str) -> None:
    """Kernels that run: interpreted, or bf16 on a GPU, which then refuses any operation that waits for it."""
    bounds = [0, 130, 130, 131, 300]
    cu_seqlens, slopes = torch.tensor(bounds, dtype=torch.int32, device=device), torch.tensor([0.917, 0.0], device=device)
    g, dtype = torch.Generator().manual_seed(0), torch.bfloat16 if device == "cuda" else torch.float32
    qkv, do = (torch.randn(shape, generator=g).to(device, dtype) for shape in ((300, 2, 3, SIZE), (300, 2, SIZE)))
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    expected, _ = lightning_triton.lightning_attention(q, k, v, slopes, cu_seqlens, None, rows=1, final=False)
    gradients = torch.autograd.grad(expected, (q, k, v), do)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        documents = LocalDocuments(cu_seqlens=cu_seqlens, bounds=bounds, enters=(-1, -1), leaves=(-1, -1))
        steps = lightning_steps(slopes, documents, backend="triton", dtype=dtype, head_size=SIZE)
        ends, kept = steps.end_states(qkv)
        o, kept = steps.outputs(qkv, ends, kept)
        back, kept_gradient = steps.initial_gradient(qkv, do)
        dqkv = steps.gradients(qkv, ends, do, back, kept, kept_gradient)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(o, expected)
    for ours, theirs in zip(dqkv.unbind(2), gradients, strict=True):
        assert torch.equal(ours, theirs)
