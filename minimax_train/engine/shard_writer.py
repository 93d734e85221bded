"""A forked process that writes this rank's part of a checkpoint while training goes on.

It has the tensors as they were at the fork: on a CPU by the system's copy-on-write, from a GPU by one copy into pinned memory before it.
It calls no collective, touches no GPU, dies with the rank, and reads back what it wrote. megatron-core's asynchronous writers are not used:
a rank waits for its own without a limit, and hangs where one dies (`count_queue.join()`, filesystem_async.py of 0.16.1).
"""

import ctypes
import json
import mmap
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch import Tensor

from minimax_train.engine.hashed import PIECE, Hashed, read_back
from minimax_train.engine.state import Sharded
from minimax_train.engine.torch_dist import Chunk, Stored, write_chunk

SILENT = 30.0
"""Seconds without a byte written after which a writer is given up."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank wrote: its file's size and checksum, and of every tensor that has boxes in it their places."""

    file: str
    size: int
    checksum: str
    shapes: dict[str, tuple[list[int], str]]
    """Whole shape and dtype, by key."""
    chunks: list[tuple[str, dict[str, Any]]]
    """Key and Chunk of every box."""


class Pinned:
    """Host memory for copies of CUDA tensors, kept from save to save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in pinned memory, complete on return; CPU tensors as they are. (No GPU has run this yet.)"""
        copied = {}
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                if name not in self._buffers or self._buffers[name].shape != tensor.shape or self._buffers[name].dtype != tensor.dtype:
                    self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                tensor = self._buffers[name].copy_(tensor, non_blocking=True)
            copied[name] = tensor
        if self._buffers:
            torch.cuda.synchronize()
        return copied


class ShardWriter:
    """One rank's writer, at work from its construction on. `failure` says what became of it; `part` what it wrote."""

    def __init__(self, state: Sharded, folder: Path, rank: int, pinned: Pinned) -> None:
        """Writes the tensors of which this rank has the main copy into `folder`/__RANK_0.distcp."""
        owned = {name: sharded for name, sharded in state.items() if is_main_replica(sharded.replica_id)}
        tensors = pinned.copies({name: sharded.data.detach() for name, sharded in owned.items()})
        self._progress, self._result = mmap.mmap(-1, 8), tempfile.TemporaryFile()  # noqa: SIM115 (as long as this object)
        self._moved, self._seen = time.monotonic(), b""
        self._status: int | None = None
        self._given_up: str | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _write_and_exit(owned, tensors, folder, rank, self._progress, self._result, parent)

    def failure(self, silent: float = SILENT) -> str | None:
        """Why there will be no `part`: it died, it failed, or wrote nothing for `silent` seconds (and is killed then). None: not so yet."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        if self._status is None:
            now, seen = time.monotonic(), self._progress[:8]
            if seen != self._seen:
                self._moved, self._seen = now, seen
            if now - self._moved <= silent:
                return None
            self.kill()
            self._given_up = f"its writer (process {self.pid}) wrote nothing for {silent:g} s"
        if self._status == 0:
            return None
        return (
            self._given_up or self._said().get("error") or f"its writer (process {self.pid}) died, exit code {self._status} (-N: signal N)"
        )

    @property
    def done(self) -> bool:
        """Whether `part` is there; ask `failure` before."""
        return self._status == 0

    def part(self) -> Part:
        return Part(**self._said())

    def kill(self) -> None:
        """Ends it, whatever it does; nothing of it is left but its file."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _said(self) -> dict[str, Any]:
        self._result.seek(0)
        text = self._result.read()
        try:
            said: dict[str, Any] = json.loads(text)
        except ValueError:
            return {}  # it died with no word
        return said


def _write_and_exit(
    owned: Sharded, tensors: dict[str, Tensor], folder: Path, rank: int, progress: mmap.mmap, result: IO[bytes], parent: int
) -> None:
    """The forked process; it never returns."""
    status, said = 1, dict[str, Any]()
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:  # else the rank died before this was asked for
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
            torch.set_num_threads(1)  # OpenMP's threads are not here
            said = asdict(_write(owned, tensors, folder / f"__{rank}_0.distcp", progress))
            status = 0
    except OSError as error:
        said = {"error": f"{error.strerror or error} ({folder})"}
    except BaseException as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    finally:
        try:
            result.write(json.dumps(said).encode())
            result.flush()
        finally:
            os._exit(status)


def _write(owned: dict[str, ShardedTensor], tensors: dict[str, Tensor], path: Path, progress: mmap.mmap) -> Part:
    """Writes the file, forces it to the disk, and reads it back. OSError where the disk refuses or gives back other bytes."""
    shapes, chunks = {}, []
    with _Watched(path, progress) as hashed:
        for name, sharded in owned.items():
            start, tensor = hashed.size, tensors[name]
            if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            write_chunk(hashed, tensor)
            box = Chunk(offset=sharded.global_offset, shape=tuple(tensor.shape), file=path.name, start=start, length=hashed.size - start)
            chunks.append((sharded.key, asdict(box)))
            shapes[sharded.key] = (list(sharded.global_shape), str(sharded.dtype).removeprefix("torch."))
    read = 0

    def show(more: int) -> None:
        nonlocal read
        read += more
        _show(progress, hashed.size + read)

    if read_back(path, show) != (hashed.size, hashed.digest()):
        raise OSError(f"{path} gives back other bytes than were written")
    return Part(file=path.name, size=hashed.size, checksum=hashed.digest(), shapes=shapes, chunks=chunks)


class _Watched(Hashed):
    """Shows how much was written, as it is."""

    def __init__(self, path: Path, progress: mmap.mmap) -> None:
        super().__init__(path)
        self._progress = progress

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for first in range(0, len(view), PIECE):
            super().write(view[first : first + PIECE])
            _show(self._progress, self.size)
        return len(view)


def _show(progress: mmap.mmap, done: int) -> None:
    progress[:8] = done.to_bytes(8, "little")


def index_of(parts: list[Part]) -> dict[str, Stored]:
    """All ranks' parts -> what the folder holds."""
    shapes = {key: shape for part in parts for key, shape in part.shapes.items()}
    chunks: dict[str, list[Chunk]] = {key: [] for key in shapes}
    for part in parts:
        for key, chunk in part.chunks:
            chunks[key].append(Chunk(**{**chunk, "offset": tuple(chunk["offset"]), "shape": tuple(chunk["shape"])}))
    return {
        key: Stored(shape=tuple(shape), dtype=getattr(torch, dtype), chunks=tuple(chunks[key])) for key, (shape, dtype) in shapes.items()
    }
