"""Run a function on n local ranks and get what each returned: for tests and benchmarks."""

import faulthandler
import gc
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from parallel.world import Place

PRELOAD = [
    "torch",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "minimax_train.train.loop",
    "minimax_train.convert.to_hf",
    "pytest",
]
"""Modules that ranks find loaded; one that is not there is no error."""
PATIENCE = 5.0
"""Seconds in which other ranks may say why they failed too, after the first has."""


def run_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[work(place, *arguments) of rank 0, 1, ...], each in a process of its own; RuntimeError with its traceback where one fails.

    `work` is a module-level function. Processes are forked from a server that has PRELOAD: ranks start in about 0.1 s after the first call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[Any] = []
    pipes: dict[Connection, int] = {}
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        place = Place(rank=rank, size=size, local_rank=rank, address=f"127.0.0.1:{store.port}", hosted=True)
        process = context.Process(target=_rank, args=(theirs, work, place, arguments))
        process.start()
        theirs.close()
        processes.append(process)
        pipes[ours] = rank
    try:
        results = _collect(pipes, processes)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.terminate()
            process.join(PATIENCE)
            if process.exitcode is None:  # a stopped process hears nothing else
                process.kill()
                process.join()
    return [results[rank] for rank in range(size)]


def _rank(pipe: Connection, work: Callable[..., Any], place: Place, arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a crash prints where each thread was
    gc.freeze()  # what was loaded before is no garbage: collecting looks at this rank's own objects alone
    try:
        outcome = pickle.dumps((work(place, *arguments), None))  # by value: shared tensors would die with this process
    except BaseException:
        outcome = pickle.dumps((None, traceback.format_exc()))
    pipe.send_bytes(outcome)


def _collect(pipes: dict[Connection, int], processes: Sequence[Any]) -> dict[int, Any]:
    """What each rank returned. RuntimeError with what every failed rank says: others often fail because of the first."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(pipes)
    while waiting:
        ready = wait(list(waiting), timeout=PATIENCE if failures else None)
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                results[rank], failure = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                processes[rank].join()
                failure = f"the process died without a word, exit code {processes[rank].exitcode} (-N: signal N)\n"
            if failure is not None:
                failures[rank] = failure
    if failures:
        raise RuntimeError("\n".join(f"rank {rank} of {len(pipes)} failed:\n{text}" for rank, text in sorted(failures.items())))
    return results
