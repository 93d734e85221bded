"""Run a function on n local ranks and get what each returned: for tests and benchmarks."""

import faulthandler
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from parallel.world import Place


def run_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[work(place, *arguments) of rank 0, 1, ...], each in a process of its own; RuntimeError with its traceback where one fails.

    `work` is a module-level function. Processes are forked from a server that has torch and megatron-core loaded: ranks start in
    about 0.3 s after the first call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "megatron.core.optimizer", "megatron.core.dist_checkpointing"])
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
            process.terminate()
            process.join()
    return [results[rank] for rank in range(size)]


def _rank(pipe: Connection, work: Callable[..., Any], place: Place, arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a crash prints where each thread was
    try:
        outcome: tuple[Any, str | None] = (work(place, *arguments), None)
    except BaseException:
        outcome = (None, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))  # by value: shared tensors would die with this process


def _collect(pipes: dict[Connection, int], processes: Sequence[Any]) -> dict[int, Any]:
    results: dict[int, Any] = {}
    waiting = dict(pipes)
    while waiting:
        for pipe in [pipe for pipe in wait(list(waiting)) if isinstance(pipe, Connection)]:
            rank = waiting.pop(pipe)
            try:
                results[rank], failure = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                failure = f"the process died without a word, exit code {processes[rank].exitcode} (-N: signal N)"
            if failure is not None:
                raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{failure}")
    return results
