"""Ranks of a little run, as processes that can be killed: forked from a server that has torch loaded, they start in half a second."""

import ctypes
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minimax_train.plan import Plan
from parallel.testing import run_ranks
from parallel.world import Place


def losses(run: Path) -> list[str]:
    """Of every step, to the last bit."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [float(line["loss"]).hex() for line in map(json.loads, lines) if "loss" in line]


class Ranks:
    """Two ranks (or `size`) that run `plan` in `run`."""

    def __init__(self, plan: Plan, run: Path, *, size: int = 2, slow_saves: float = 0.0, limit: float = 0.0) -> None:
        """`slow_saves`: seconds that the first rank sleeps in each. `limit`: see parallel.pulse."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "megatron.core.optimizer", "megatron.core.dist_checkpointing", "minimax_train.train.loop"])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        address = f"127.0.0.1:{self._store.port}"
        places = [Place(rank=rank, size=size, local_rank=rank, address=address, hosted=True) for rank in range(size)]
        self._processes: list[Any] = [context.Process(target=trains, args=(place, plan, run, slow_saves, limit)) for place in places]
        self._since = time.time()
        for process in self._processes:
            process.start()

    def alive(self) -> bool:
        return all(process.exitcode is None for process in self._processes)

    def begun(self, run: Path) -> int | None:
        """The step that this start went on from, once it has said so."""
        said = run / "began"
        return int(said.read_text()) if said.exists() and said.stat().st_mtime >= self._since and said.read_text() else None

    def wait_until_begun(self, run: Path) -> int | None:
        """What `begun` says, once it says so or a rank has ended."""
        while self.begun(run) is None and self.alive():
            time.sleep(0.01)
        return self.begun(run)

    def kill(self) -> bool:
        """Both at once; False where they had ended well before."""
        alive = self.alive()
        for process in self._processes:
            process.kill()
            process.join()
        return alive or any(process.exitcode for process in self._processes)

    def join(self) -> None:
        for process in self._processes:
            process.join()
        assert not any(process.exitcode for process in self._processes), [process.exitcode for process in self._processes]


def trains(place: Place, plan: Plan, run: Path, slow_saves: float, limit: float) -> None:
    """One rank's whole run."""
    from minimax_train.engine.session import session
    from minimax_train.train import loop
    from minimax_train.train.hang import pulse_of

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    whole, opened = loop._Run._write, loop.open_run

    def slowly(self: Any, *arguments: Any, **named: Any) -> None:
        if place.rank == 0:
            time.sleep(slow_saves)
        whole(self, *arguments, **named)

    def opens(*arguments: Any) -> Any:
        opening = opened(*arguments)
        if place.rank == 0:
            (run / "began").write_text(str(opening.progress.step))
        return opening

    loop._Run._write, loop.open_run = slowly, opens  # type: ignore[method-assign]
    with pulse_of(place, run, limit) as pulse, session(place=place, layout=plan.layout) as joined:
        loop.train(plan, run, joined, pulse=pulse)


def _sleep() -> None:
    time.sleep(600)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold() -> None:
    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the interpreter's lock


FAULTS = (_sleep, _stop, _hold)


def hung(plan: Plan, run: Path, *, culprit: int, fault: int, limit: float) -> tuple[bool, float]:
    """Whether the rank with the fault was named, alone, and how many seconds after it."""
    try:
        run_ranks(2, _faulty, plan, run, culprit, fault, limit)
    except RuntimeError:
        verdicts = list((run / "logs").glob("hang-*/verdict.json"))
        if len(verdicts) != 1:
            return False, float("inf")
        after = verdicts[0].stat().st_mtime - float((run / "since").read_text())
        return json.loads(verdicts[0].read_text())["ranks"] == [culprit], after
    return False, float("inf")


def _faulty(place: Place, plan: Plan, run: Path, culprit: int, fault: int, limit: float) -> None:
    from minimax_train.engine.session import session
    from minimax_train.engine.trainer import Trainer
    from minimax_train.train.hang import pulse_of
    from minimax_train.train.loop import train

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    whole, steps = Trainer.step, 0

    def step(self: Trainer, *arguments: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if place.rank == culprit and steps == 4:
            (run / "since").write_text(str(time.time()))
            FAULTS[fault]()
        return whole(self, *arguments, **named)

    Trainer.step = step  # type: ignore[method-assign]
    with pulse_of(place, run, limit) as pulse, session(place=place, layout=plan.layout) as joined:
        train(plan, run, joined, pulse=pulse)


def replica_flip(place: Place, plan: Plan, bad: int, seed: int) -> str:
    """What is said of a step in whose backward pass a random bit of a weight of rank `bad` flips."""
    from minimax_train.engine.replicas import Corruption
    from minimax_train.engine.session import session
    from minimax_train.engine.trainer import Trainer
    from minimax_train.train.rows import to_row
    from tests.engine.equality import packed

    with session(place=place) as joined:
        trainer = Trainer(plan, joined)
        draw = torch.Generator().manual_seed(seed)
        named = [(name, weight) for name, weight in trainer.decoder.named_parameters() if name != "embedding.weight"]
        _, weight = named[int(torch.randint(len(named), (), generator=draw))]
        place_of_it = int(torch.randint(weight.numel(), (), generator=draw))

        def flip(_: torch.Tensor) -> None:
            if place.rank == bad:
                weight.detach().view(-1).view(torch.int32)[place_of_it] ^= 1

        trainer.decoder.get_parameter("embedding.weight").register_hook(flip)
        try:
            trainer.step([to_row(packed([0, 64], place.rank), joined)], 1e-3, check=True)
        except Corruption as error:
            return str(error)
        return "nothing"
