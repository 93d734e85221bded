"""Preflight by collectives: this rank's part in a short conversation of all, and what it says of it in a shared folder."""

import os
import threading
from datetime import timedelta
from pathlib import Path

import torch

from parallel.smoke import SIZES, Tell, converse
from parallel.world import Place, joined, meet


def check_collectives(folder: Path, node: str, place: Place, device: str, *, seconds: float, least: float) -> bool:
    """Whether everything this rank heard was right, and no slower than `least` GB/s in the largest all-reduce.

    NODE.RANK.collectives gets a line for every message size, and last `good` or `wrong: ...`; where that line is missing the rank was
    stopped or killed. After `seconds` the process says what it was waiting for and ends with status 1: a collective that hangs cannot be
    taken back.
    """
    path = folder / f"{node}.{place.rank}.collectives"
    doing = ["waiting for the other ranks to come"]
    with path.open("w") as file:

        def tell(line: str) -> None:
            file.write(line + "\n")
            file.flush()
            doing[0] = f"after {line}"

        def give_up() -> None:
            file.write(f"wrong: rank {place.rank} on {node}: nothing came within {seconds:g} s, {doing[0]}\n")
            file.flush()
            os._exit(1)

        tell(f"rank {place.rank} of {place.size} on {node}")
        doing[0] = "waiting for the other ranks to come"
        watch = threading.Timer(seconds, give_up)
        watch.daemon = True
        watch.start()
        try:
            wrong, rate = _talk(place, device, tell, timedelta(seconds=2 * seconds))
        except Exception as error:  # gloo, NCCL and the store raise what they like; whichever it is, these ranks do not hear each other
            wrong, rate = [f"{doing[0]}: {type(error).__name__}: {' '.join(str(error).split())}"], least
        watch.cancel()
        if place.size > 1 and rate < least:
            wrong.append(f"all-reduce at {rate:.3g} GB/s, {least:g} wanted")
        tell(f"wrong: rank {place.rank} on {node}: {'; '.join(wrong)}" if wrong else "good")
    return not wrong


def _talk(place: Place, device: str, tell: Tell, patience: timedelta) -> tuple[list[str], float]:
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    on = torch.device(device, *((place.local_rank,) if device == "cuda" else ()))
    with joined(place, "nccl" if device == "cuda" else "gloo", meet(place, patience), timeout=patience):
        return converse(place, on, SIZES[device], tell)
