"""Attention over parts of the keys: merged by the log-sum-exp it is the equation, and the parts' gradients add up to the equation's."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from minimax_train.kernels.partial_attention import PartialAttention, partial_attention
from minimax_train.kernels.softmax_attention import hindrance
from tests.kernels.test_softmax_attention import CPU, CUDA, HEAD_SIZE, HEADS, KEY_VALUE_HEADS, Installed, equation, installed

__all__ = ["installed"]
BOUNDS, CUT = [0, 37, 37, 128], 70
"""Documents of a row, one of them empty, and where the last one is cut in two parts."""


def inputs(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v, do: the same numbers, bf16 all of them, in every dtype."""
    g = torch.Generator().manual_seed(0)
    shapes = [(BOUNDS[-1], heads, HEAD_SIZE) for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS, HEADS)]
    return [torch.randn(shape, generator=g).bfloat16().to(device, dtype) for shape in shapes]


def exact() -> list[Tensor]:
    q, k, v, do = inputs(torch.float64, CPU)
    o = equation(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), torch.tensor(BOUNDS), BOUNDS)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def in_parts(attend: PartialAttention, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """o, dq, dk, dv of the row: causal in each part of a document, and a rectangle of late queries and early keys."""
    q, k, v, do = inputs(dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    local, early, late = [*BOUNDS[:-1], CUT, BOUNDS[-1]], slice(BOUNDS[-2], CUT), slice(CUT, BOUNDS[-1])
    box = [0, late.stop - late.start], [0, early.stop - early.start], False
    o, lse = attend.forward(q, k, v, local, local, True)
    o_box, lse_box = attend.forward(q[late], k[early], v[early], *box)
    assert (o.dtype, o.shape, lse.dtype, lse.shape) == (dtype, q.shape, wide, q.shape[:2])
    whole, lse = o.to(wide), lse.clone()
    both = torch.logaddexp(lse[late], lse_box)
    whole[late] = (lse[late] - both).exp()[..., None] * whole[late] + (lse_box - both).exp()[..., None] * o_box
    lse[late] = both
    o = whole.to(dtype)
    dq, dk, dv = (x.to(wide) for x in attend.backward(do, q, k, v, o, lse, local, local, True))
    dq_box, dk_box, dv_box = attend.backward(do[late], q[late], k[early], v[early], o[late], lse[late], *box)
    assert {x.dtype for x in (dq_box, dk_box, dv_box)} == {dtype}
    dq[late] += dq_box
    dk[early] += dk_box
    dv[early] += dv_box
    return [o, dq, dk, dv]


def off(parts: list[Tensor]) -> float:
    """The largest error, relative to the norm of what it should be."""
    return max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(parts, exact(), strict=True))


@pytest.mark.parametrize("backend", ["definition", "sdpa", "te"])
def test_parts_against_the_equation(backend: str) -> None:
    """fp64, fp32 and bf16; te has no parts of its own, and on a CPU takes sdpa's."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        attend = partial_attention(backend, device=CPU, dtype=dtype, head_size=HEAD_SIZE)
        assert off(in_parts(attend, dtype, CPU)) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("backend", ["flash", "varlen", "definition"])
def test_on_a_gpu(backend: str) -> None:
    """bf16 against the equation in fp64 on the same numbers, within 1%."""
    try:
        attend = partial_attention(backend, device=CUDA, dtype=torch.bfloat16, head_size=HEAD_SIZE)
    except ValueError as reason:
        pytest.skip(str(reason))
    assert off(in_parts(attend, torch.bfloat16, CUDA)) < 1e-2


def test_torch_takes_the_calls_of_varlen(installed: Installed) -> None:
    """Schema and shapes, without a GPU: on the meta device nothing is computed."""
    installed("torch.nn.attention.varlen")
    q, k, v, do = inputs(torch.bfloat16, torch.device("meta"))
    attend = parts_of("varlen")
    o, lse = attend.forward(q[:50], k, v, [0, 50], [0, 128], False)
    assert (o.shape, lse.shape) == (q[:50].shape, (50, HEADS))
    gradients = attend.backward(do[:50], q[:50], k, v, o, lse, [0, 50], [0, 128], False)
    assert [x.shape for x in gradients] == [x.shape for x in (o, k, v)]


def parts_of(backend: str) -> PartialAttention:
    """What a GPU would be given."""
    return partial_attention(backend, device=CUDA, dtype=torch.bfloat16, head_size=HEAD_SIZE)


class Standin:
    """What flash-attn's modules document, by the definition in whatever dtype: how our calls read their signatures."""

    definition = partial_attention("definition", device=CPU, dtype=torch.float64, head_size=HEAD_SIZE)

    @classmethod
    def bounds(cls, queries: Tensor, keys: Tensor, longest: tuple[int, int]) -> tuple[list[int], list[int]]:
        assert queries.dtype == keys.dtype == torch.int32
        assert longest == (queries.diff().max(), keys.diff().max())
        return queries.tolist(), keys.tolist()

    @classmethod
    def write(cls, into: tuple[Tensor, ...], lse_HT: Tensor, tensors: tuple[Tensor, ...], *where: Any) -> None:
        assert lse_HT.is_contiguous()
        for whole, part in zip(into, cls.definition.backward(*tensors, lse_HT.T, *where), strict=True):
            whole.copy_(part)

    @staticmethod
    def forward_2(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
        softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (dropout_p, softmax_scale) == (0.0, HEAD_SIZE**-0.5)
        where = Standin.bounds(cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        o, lse = Standin.definition.forward(q, k, v, *where, causal)
        return o, lse.T.contiguous(), torch.empty(0), torch.empty(0)

    @staticmethod
    def backward_2(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
        causal: bool, window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert (dropout_p, softmax_scale) == (0.0, HEAD_SIZE**-0.5)
        assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
        where = Standin.bounds(cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        Standin.write((dq, dk, dv), softmax_lse, (dout, q, k, v, out), *where, causal)
        return torch.empty(0)

    @staticmethod
    def forward_3(
        q: Tensor, k: Tensor, v: Tensor, k_new: None, v_new: None, qv: None, out: None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        cu_seqlens_k_new: None, seqused_q: None, seqused_k: None, max_seqlen_q: int, max_seqlen_k: int, page_table: None,
        kv_batch_idx: None, leftpad_k: None, rotary_cos: None, rotary_sin: None, seqlens_rotary: None, q_descale: None, k_descale: None,
        v_descale: None, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert softmax_scale == HEAD_SIZE**-0.5
        where = Standin.bounds(cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        o, lse = Standin.definition.forward(q, k, v, *where, causal)
        return o, lse.T.contiguous(), torch.empty(0), torch.empty(0)

    @staticmethod
    def backward_3(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        sequed_q: None, sequed_k: None, max_seqlen_q: int, max_seqlen_k: int, dq: Tensor, dk: Tensor, dv: Tensor, softmax_scale: float,
        is_causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        assert softmax_scale == HEAD_SIZE**-0.5
        where = Standin.bounds(cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        Standin.write((dq, dk, dv), softmax_lse, (dout, q, k, v, out), *where, is_causal)
        return torch.empty(0)


FLASH_2 = {"_flash_attn_varlen_forward": Standin.forward_2, "_flash_attn_varlen_backward": Standin.backward_2}
FLASH_3 = {"_flash_attn_forward": Standin.forward_3, "_flash_attn_backward": Standin.backward_3}


@pytest.mark.parametrize(("module", "name", "functions"), [
    ("flash_attn", "flash_attn.flash_attn_interface", FLASH_2),
    ("flash_attn_interface", "flash_attn_interface", FLASH_3),
])  # fmt: skip
def test_calls_by_the_book(
    module: str, name: str, functions: dict[str, Any], installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our side of each call to flash-attn 2 and 3, and that te is served by it."""
    fake = ModuleType(name)
    vars(fake).update(functions)
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setitem(sys.modules, name, fake)
    installed(module)
    for backend in ("flash", "te"):
        assert off(in_parts(parts_of(backend), torch.float64, CPU)) < 1e-12


def test_choice(installed: Installed) -> None:
    """te becomes flash or varlen, and what neither takes the definition; others are what they say."""
    installed("transformer_engine", "torch.nn.attention.varlen")
    assert parts_of("te") == parts_of("varlen") != parts_of("definition")
    installed("transformer_engine")
    assert parts_of("te") == parts_of("sdpa") == parts_of("definition")
    with pytest.raises(ValueError, match="^softmax backend 'varlen' is not installed here; choose definition, or sdpa on a CPU$"):
        parts_of("varlen")
    with pytest.raises(ValueError, match="'magic' is unknown; choose one of definition, flash, te, varlen, sdpa"):
        parts_of("magic")
    assert hindrance("sdpa", CUDA, torch.float32, 12) is None
