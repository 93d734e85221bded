"""What every shipped Triton kernel takes of an H100: registers, stack, spills, shared memory, tensor cores. Compiled without a GPU.

    python benchmarks/kernel_resources.py [--json] [--short]

The operators are called on tensors without memory, and each launch is compiled as it would be launched, with the compiler and
disassembler of the triton wheel. Writes the table into docs/kernels.md; with --json prints the rows and writes nothing. With --short, of
the attention kernels only those for heads of 128, the released models', in bf16 and for 8 heads a rank.
Exit code 1 if a kernel has a stack, spills, needs more shared memory or registers than a multiprocessor has, or misses the tensor cores;
with --json also if docs/kernels.md shows another table made by the same triton.
"""

import argparse
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minimax_train.kernels import cross_entropy_triton, gated_norm_triton, lightning_triton, lightning_triton_kernels, rotary_triton
from minimax_train.kernels.lightning_steps import LocalDocuments
from minimax_train.kernels.lightning_triton_steps import TritonSteps

SHARED_MEMORY = 232_448  # bytes a block may have on sm_90
REGISTERS = 65_536
TOKENS, HEADS, VOCABULARY = 65_536, 8, 200_064
PAGE = Path(__file__).parents[1] / "docs/kernels.md"
BEGIN, END = "<!-- made by benchmarks/kernel_resources.py -->\n", "<!-- end -->\n"
PRODUCTS = ("segment_states", "outputs", "query_gradient", "key_value_gradient")  # the kernels that multiply matrices
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch: the kernel's name, its arguments as Triton would specialise them, warps and stages."""

    operator: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    warps: int
    stages: int


class Recorder:
    """Stands where a kernel stands; launching it notes the launch."""

    def __init__(self, name: str, kernel: Any, operator: str, launches: list[Launch]) -> None:
        self.name, self.kernel, self.operator, self.launches = name, kernel, operator, launches

    @classmethod
    @contextmanager
    def of(cls, module: ModuleType, operator: str) -> Iterator[list[Launch]]:
        """Inside the `with`, launches of the module's kernels are noted, not made, on tensors without memory."""
        launches: list[Launch] = []
        kernels = {name: kernel for name, kernel in vars(module).items() if isinstance(kernel, triton.JITFunction)}
        fakes = {name: cls(name, kernel, operator, launches) for name, kernel in kernels.items()}
        with patch.multiple(module, **fakes), torch.device("meta"):
            yield launches

    def __getitem__(self, grid: object) -> "Recorder":
        return self

    def __call__(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any) -> None:
        bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
        compile_time = {p.name for p in self.kernel.params if p.is_constexpr}
        general = {p.name for p in self.kernel.params if p.do_not_specialize}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned = []
        for i, (name, value) in enumerate(bound.items()):
            if name in compile_time or (isinstance(value, int) and value == 1 and name not in general):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                aligned.append(i)
            else:
                signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
                if value % 16 == 0 and name not in general:
                    aligned.append(i)
        self.launches.append(
            Launch(
                operator=self.operator,
                module=self.kernel.fn.__module__,
                kernel=self.name,
                signature=signature,
                constants=constants,
                aligned=tuple(aligned),
                warps=num_warps,
                stages=num_stages,
            )
        )


def attention(size: int, dtype: torch.dtype, *, heads: int, length: int | None) -> list[Launch]:
    """Every launch of lightning_attention, forward and backward, with initial and final states."""
    with Recorder.of(lightning_triton_kernels, f"lightning_attention, D {size}, {TYPES[dtype]}") as launches, unrefused():
        qkv = torch.empty(TOKENS, heads, 3, size, dtype=dtype, requires_grad=True)
        initial = torch.empty(3, heads, size, size, requires_grad=True)
        o, final = lightning_triton.lightning_attention(
            *qkv.unbind(2), torch.empty(heads), torch.empty(4, dtype=torch.int32), initial, rows=1, final=True, length=length
        )
        torch.autograd.grad([o, final], [qkv, initial], [torch.empty_like(o), torch.empty_like(final)])
    return launches


def steps(size: int, dtype: torch.dtype, *, heads: int, documents: int, cut: bool, length: int | None) -> list[Launch]:
    """Every launch of the model's layer (TritonSteps), forward and backward; `cut`: one document enters the rank, and one leaves it."""
    bounds = [n * TOKENS // documents for n in range(documents + 1)]
    with Recorder.of(lightning_triton_kernels, f"lightning steps, D {size}, {TYPES[dtype]}") as launches, unrefused():
        cu_seqlens = torch.empty(documents + 1, dtype=torch.int32)
        enters, leaves = ((0, -1), (-1, documents - 1)) if cut else ((-1, -1), (-1, -1))
        local = LocalDocuments(cu_seqlens=cu_seqlens, bounds=bounds, enters=enters, leaves=leaves)
        ours = TritonSteps.of(torch.empty(heads), local, dtype=dtype, head_size=size, length=length)
        qkv, o = torch.empty(TOKENS, heads, 3, size, dtype=dtype), torch.empty(TOKENS, heads, size, dtype=dtype)
        ends, kept = ours.end_states(qkv)
        _, kept_outputs = ours.outputs(qkv, ends, kept)
        back, kept_gradient = ours.initial_gradient(qkv, o)
        ours.gradients(qkv, ends, o, back, kept_outputs, kept_gradient)
    return launches


def unrefused() -> AbstractContextManager[Any]:
    """Lets tensors without memory pass for a GPU's."""
    return patch.object(lightning_triton, "_refuse")


def neighbours(dtype: torch.dtype, tokens: int) -> Iterator[Launch]:
    """The gated norm whole and sharded, the rotation of 8 and 64 heads, the cross-entropy: forward and backward."""
    for channels in (HEADS * 128, 64 * 128):
        with Recorder.of(gated_norm_triton, f"gated norm, {channels} channels, {TYPES[dtype]}") as launches:
            x, gate, weight = (torch.empty(*shape, channels, dtype=dtype, requires_grad=True) for shape in ((tokens,), (tokens,), ()))
            y = gated_norm_triton.gated_rms_norm(x, gate, weight, 1e-6)
            torch.autograd.grad(y, (x, gate, weight), torch.empty_like(y))
            sums = gated_norm_triton.sum_of_squares(x)
            gated_norm_triton.normalise(x, gate, weight, sums, 8 * channels, 1e-6)
            dots = gated_norm_triton.row_dot(x, gate, weight, y, sums, 8 * channels, 1e-6)
            gated_norm_triton.gradients(x, gate, weight, y, sums, dots, 8 * channels, 1e-6)
        yield from launches
    for heads in (1, HEADS, 64):
        with Recorder.of(rotary_triton, f"rotary, {heads} heads of 128, {TYPES[dtype]}") as launches:
            x = torch.empty(tokens, heads, 128, dtype=dtype, requires_grad=True)
            y = rotary_triton.Rotary.apply(x, torch.empty(tokens, 1, 32), torch.empty(tokens, 1, 32))
            torch.autograd.grad(y, x, torch.empty_like(y))
        yield from launches
    with Recorder.of(cross_entropy_triton, f"cross-entropy, vocabulary {VOCABULARY}, {TYPES[dtype]}") as launches:
        logits, labels = torch.empty(min(tokens, 1024), VOCABULARY, dtype=dtype), torch.empty(min(tokens, 1024), dtype=torch.int64)
        _, normaliser = cross_entropy_triton.cross_entropy(logits, labels)
        cross_entropy_triton.cross_entropy_gradient_(logits, labels, normaliser, torch.empty_like(normaliser))
    yield from launches


def some_launches() -> Iterator[Launch]:
    """The model's steps and the kernels beside them, each in few forms."""
    yield from steps(128, torch.bfloat16, heads=HEADS, documents=3, cut=True, length=None)
    yield from attention(128, torch.bfloat16, heads=HEADS, length=None)
    yield from neighbours(torch.bfloat16, TOKENS)


def all_launches() -> Iterator[Launch]:
    """The model's steps in every form at 8 heads; elsewhere the barest and the fullest: what differs is a stride."""
    lengths = (None, TOKENS)  # of a segment: by the rule, with states between segments; and a single pass, without
    for size, dtype in itertools.product(lightning_triton.HEAD_SIZES, (torch.bfloat16, torch.float32)):
        for length, cut in itertools.product(lengths, (False, True)):
            yield from steps(size, dtype, heads=HEADS, documents=3, cut=cut, length=length)
        for heads in (64, 1):
            yield from steps(size, dtype, heads=heads, documents=1, cut=False, length=TOKENS)
            yield from steps(size, dtype, heads=heads, documents=1, cut=True, length=None)
        yield from attention(size, dtype, heads=HEADS, length=None)
    for size in lightning_triton.HEAD_SIZES:
        yield from steps(size, torch.float16, heads=HEADS, documents=3, cut=True, length=None)
        yield from attention(size, torch.float16, heads=HEADS, length=None)
        yield from attention(size, torch.bfloat16, heads=1, length=TOKENS)
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1, TOKENS):
            yield from neighbours(dtype, tokens)


def resources(launch: Launch) -> dict[str, Any]:
    """Compiles one launch for sm_90 and reads what the binary takes."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(fn=kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    built = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        code = subprocess.run([tool, "-res-usage", "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: re.search(rf"{name}:(\d+)", code) for name in ("REG", "STACK")}
    if not all(found.values()):
        raise RuntimeError(f"cuobjdump's report of {launch.kernel} was not understood: {code[:1000]}")
    registers, stack = (int(match[1]) for match in found.values() if match)
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("LDL", "STL", "HGMMA", "HMMA")}
    tf32 = len(re.findall(r"\bH?G?MMA\S*TF32", code))
    return {
        "kernel": launch.kernel, "constants": launch.constants, "warps": launch.warps, "stages": launch.stages, "registers": registers,
        "stack": stack, "spills": counts["LDL"] + counts["STL"], "shared": built.metadata.shared, "HGMMA": counts["HGMMA"],
        "HMMA": counts["HMMA"], "TF32": tf32,
    }  # fmt: skip


def compiled(launches: list[Launch]) -> list[dict[str, Any]]:
    """A row for each launch; what two operators launch alike is compiled once."""
    alike = {repr(replace(launch, operator="")): launch for launch in launches}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = dict(zip(alike, pool.map(resources, alike.values()), strict=True))
    return [{"operator": launch.operator, **found[repr(replace(launch, operator=""))]} for launch in launches]


def complaints(row: dict[str, Any]) -> list[str]:
    """What is wrong with one kernel."""
    wrong = [f"{row['stack']} bytes of stack"] if row["stack"] else []
    wrong += [f"{row['spills']} spills"] if row["spills"] else []
    wrong += [f"{row['shared']} bytes of shared memory"] if row["shared"] > SHARED_MEMORY else []
    wrong += [f"{row['registers']} registers x {32 * row['warps']} threads"] if row["registers"] * 32 * row["warps"] > REGISTERS else []
    if row["kernel"] in PRODUCTS:
        low = "fp32" not in row["operator"]
        wrong += ["no HGMMA"] if low and not row["HGMMA"] else []
        wrong += ["HMMA"] if row["HMMA"] else []
        wrong += ["tensor cores for fp32 (TF32)"] if not low and (row["HGMMA"] or row["TF32"]) else []
    return [f"{row['operator']}: {row['kernel']}: {what}" for what in wrong]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per operator and kernel, the most (of HGMMA the least) over its forms."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["operator"], row["kernel"]), []).append(row)
    lines = [
        f"triton {triton.__version__}, {len(rows)} launches, {len({r['operator'] for r in rows})} operators; each line is the worst of the "
        "kernel's forms (with and without states between segments, given states, wanted end states). No kernel was run for this table.",
        "",
        "| operator | kernel | forms | warps | stages | registers | stack | spills | shared memory | HGMMA |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (operator, kernel), forms in groups.items():
        most = [max(row[k] for row in forms) for k in ("warps", "stages", "registers", "stack", "spills")]
        shared, tensor = max(row["shared"] for row in forms), min(row["HGMMA"] for row in forms)
        lines.append(f"| {operator} | {kernel} | {len(forms)} | {' | '.join(map(str, most))} | {shared / 1024:.0f} KB | {tensor} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, write nothing")
    parser.add_argument("--short", action="store_true", help="a few forms; only with --json")
    a = parser.parse_args()
    as_json = a.json
    if a.short and not as_json:
        parser.error("--short needs --json: the table in docs/kernels.md is of all forms")
    rows = compiled(list({repr(launch): launch for launch in (some_launches() if a.short else all_launches())}.values()))  # without repeats
    wrong = [complaint for row in rows for complaint in complaints(row)]
    before, rest = PAGE.read_text().split(BEGIN)
    shown, after = rest.split(END)
    if as_json:
        print(json.dumps(rows))
        if not a.short and shown.startswith(f"triton {triton.__version__},") and shown != table(rows):
            wrong.append("docs/kernels.md shows another table: run benchmarks/kernel_resources.py")
    else:
        print(table(rows))
        PAGE.write_text(before + BEGIN + table(rows) + END + after)
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
