"""Which dtype each tensor has on the way in and out: kept, unless a cast is asked for; routers always fp32, as released."""

from collections.abc import Iterable

import torch
from torch import Tensor

from minimax_train.convert.safetensors_file import NAMES, Located
from minimax_train.convert.table import Entry
from minimax_train.plan import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FROM = (torch.float32, torch.bfloat16, torch.float16)


def precision_of(tensors: dict[str, Located], entries: Iterable[Entry], cast: Precision | None) -> Precision:
    """The precision of all weights but routers. ValueError, naming a tensor, where that takes a cast nobody asked for."""
    weights: dict[torch.dtype, str] = {}
    routers: dict[torch.dtype, str] = {}
    for entry in entries:
        for part in entry.parts:
            (routers if entry.fp32 else weights).setdefault(tensors[part.name].dtype, part.name)
    for dtype, name in (weights | routers).items():
        if dtype not in _FROM:
            raise ValueError(f"{name} is {NAMES[dtype]}; weights are F32, BF16 or F16")
    if cast is not None:
        return cast
    known: dict[torch.dtype, Precision] = {dtype: precision for precision, dtype in DTYPES.items()}
    if len(weights) > 1 or next(iter(weights)) not in known:
        listed = "; ".join(f"{NAMES[dtype]} ({name})" for dtype, name in weights.items())
        raise ValueError(f"weights are {listed}; without a cast all of them are F32 or all BF16: ask for --cast fp32 or --cast bf16")
    if routers.keys() != {torch.float32}:
        dtype, name = next((d, n) for d, n in routers.items() if d != torch.float32)
        same = known[next(iter(weights))]
        raise ValueError(f"{name}, a router, is {NAMES[dtype]}; routers are kept in F32: ask for --cast {same} (the rest stays)")
    return known[next(iter(weights))]


def dtype_of(entry: Entry, precision: Precision) -> torch.dtype:
    """Of one parameter in a checkpoint or an export of that precision."""
    return torch.float32 if entry.fp32 else DTYPES[precision]


def is_finite(x: Tensor) -> bool:
    """No NaN, no infinity: both would show in the least or greatest number. Ten times as fast as isfinite on a CPU."""
    return bool(torch.isfinite(torch.stack(x.aminmax())).all())
