"""Work done by several processes of this machine, in whatever order it gets done."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def each(work: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int) -> Iterator[Result]:
    """work(job) of every job; with several workers in the order in which they finish, each in a forked process.

    `jobs` is asked for the next one only when a process is free. An exception in `work` or `jobs` ends all processes and is raised
    here. Raises ChildProcessError when one is killed. Processes end by themselves when their parent is gone.
    """
    if workers <= 1:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("fork")  # the children have the tokenizer loaded: nothing is imported or sent again
    idle: list[Connection] = []
    processes = []
    busy: list[Connection] = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            idle.append(ours)
        waiting = iter(jobs)
        more = True
        while more or busy:
            while more and idle:
                job = next(waiting, None)
                if job is None:
                    more = False
                    break
                idle[-1].send(job)
                busy.append(idle.pop())
            for connection in wait(busy) if busy else []:
                assert isinstance(connection, Connection)
                value = _receive(connection)
                busy.remove(connection)
                idle.append(connection)
                yield value
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _receive(connection: Connection) -> Any:
    try:
        good, value = connection.recv()
    except (EOFError, ConnectionError):
        raise ChildProcessError("a worker process was killed (out of memory?); call again to go on, perhaps with fewer --workers") from None
    if not good:
        raise value
    return value


def _serve(connection: Connection, work: Callable[[Any], Any], parent: int) -> None:
    """Of a child: does what comes until it is killed or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent sees to it
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, work(job)))
        except Exception as error:
            connection.send((False, error))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
