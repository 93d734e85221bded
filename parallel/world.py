"""Joining the other ranks, however they were started: by torchrun, by srun, by --ranks N, or alone."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for others."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Who this process is among the ranks of a run, and where they meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str | None = None
    """host:port of the rendezvous; None for a world of one."""
    hosted: bool = False
    """The launcher keeps the rendezvous store; else rank 0 does."""
    attempt: int = 0
    """Times that the launcher has started the ranks again: what an earlier attempt left in a store that outlived it is not read."""
    node: str = ""
    """Slurm's name for the machine, where Slurm started the process."""


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise ValueError(
            f"the launcher's variable {name} is {environment.get(name)!r}; a number is needed: start through torchrun or srun"
        ) from None


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place torchrun or srun gave this process, or None when neither started it.

    srun is known by SLURM_STEP_ID (a batch script has SLURM_PROCID too, but no step of srun's); MASTER_ADDR names its first host,
    by default the host srun was called on, and MASTER_PORT the port, by default derived from the job id.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        address = f"{environment.get('MASTER_ADDR', '127.0.0.1')}:{_number(environment, 'MASTER_PORT')}"
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0
        return Place(
            rank=_number(environment, "RANK"),
            size=_number(environment, "WORLD_SIZE"),
            local_rank=local,
            address=address,
            hosted=hosted,
            attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
            node=environment.get("SLURMD_NODENAME", ""),
        )
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        host = environment.get("MASTER_ADDR") or environment.get("SLURM_SRUN_COMM_HOST", "127.0.0.1")
        port = environment.get("MASTER_PORT") or str(10_000 + _number(environment, "SLURM_JOB_ID") % 50_000)
        return Place(
            rank=_number(environment, "SLURM_PROCID"),
            size=_number(environment, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(environment, "SLURM_LOCALID"),
            address=f"{host}:{port}",
            node=environment.get("SLURMD_NODENAME", ""),
        )
    return None


def meet(place: Place, timeout: timedelta = PATIENCE) -> dist.Store:
    """The store through which the ranks find each other; it must outlive every `joined` that uses it."""
    if place.address is None:
        return dist.HashStore()
    host, _, port = place.address.rpartition(":")
    master = place.rank == 0 and not place.hosted
    store = dist.TCPStore(host, int(port), is_master=master, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"attempt-{place.attempt}", store)


def told_by_first(store: dist.Store, place: Place, name: str, value: Callable[[], int]) -> int:
    """What `value` is on the first rank, on every rank; before there are process groups."""
    if place.rank == 0:
        store.set(name, str(value()))
    return int(store.get(name))


@contextmanager
def joined(place: Place, backend: str, store: dist.Store, *, name: str = "world", timeout: timedelta = PATIENCE) -> Iterator[None]:
    """The default process group exists inside the `with`. `name`: another for each world that a store is used for."""
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=place.rank, world_size=place.size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _die_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    connection.wait([launcher.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _start(local_rank: int, main: Callable[..., int], size: int, port: int, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_die_with_launcher, daemon=True).start()  # the server that forked this rank lives on
    status = main(Place(rank=local_rank, size=size, local_rank=local_rank, address=f"127.0.0.1:{port}", hosted=True), *arguments)
    if status:
        raise SystemExit(status)


def run_local(main: Callable[..., int], size: int, *arguments: Any, preload: Sequence[str] = ()) -> int:
    """Runs main(place, *arguments) -> exit status on `size` local processes and returns the first failure's status, or 0.

    `main` and its arguments must pickle. When a rank fails the others are stopped; they also stop when this process dies. SIGUSR1 is passed
    on to every rank.

    Without a GPU the ranks are forked from one process that has `preload` (names of modules), which loads them once and not `size` times; a
    process in which CUDA was touched must not be forked, so with a GPU each rank starts anew.
    """
    if size == 1:
        return main(Place(), *arguments)
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(list(preload))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = multiprocessing.start_processes(_start, (main, size, store.port, arguments), nprocs=size, join=False, start_method=method)

    def pass_on(number: int, _: object) -> None:
        for pid in ranks.pids():
            os.kill(pid, number)

    before = signal.signal(signal.SIGUSR1, pass_on)
    try:
        while not ranks.join(grace_period=10):
            pass
    except multiprocessing.ProcessExitedException as failure:
        return failure.exit_code if failure.exit_code > 0 else 128 - failure.exit_code
    finally:
        signal.signal(signal.SIGUSR1, before)
    return 0
