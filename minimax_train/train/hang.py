"""What is kept when a rank holds the others up, in RUN/logs/hang-TIME/: the verdict, every rank's stacks, NCCL's flight recorder."""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.pulse import Pulse, flight_recorder
from parallel.verdict import Beat, Verdict
from parallel.world import Place

WORDS = 0.5
"""Seconds that a process gets to write its stacks before it is killed."""


@contextmanager
def pulse_of(place: Place, run: Path, limit: float) -> Iterator[Pulse]:
    """This rank's pulse, beating inside the `with`; `limit` as in Pulse. SIGUSR2 then writes the stacks of all threads to a file without a
    name, whoever holds the interpreter; another process of the host finds it under /proc."""
    with tempfile.TemporaryFile() as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        pulse = Pulse(place, limit, lambda verdict: keep(verdict, place, run), f"/proc/{os.getpid()}/fd/{stacks.fileno()}")
        pulse.start()
        try:
            yield pulse
        finally:
            pulse.stop()
            faulthandler.unregister(signal.SIGUSR2)


def keep(verdict: Verdict, place: Place, run: Path) -> None:
    """This rank's stacks; by ranks not to blame, the verdict, and what a culprit on the same host can still say. It is killed then:
    a process that is stopped hears nothing else."""
    told = [beat for beat in verdict.beats if beat.host == socket.gethostname() and beat.rank != place.rank]
    if place.rank not in verdict.ranks:
        print(f"minimax-train: rank {place.rank} leaves: {verdict}", file=sys.stderr, flush=True)
    folder = run / "logs" / f"hang-{verdict.when}"
    if run.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if place.rank not in verdict.ranks or verdict.kind != "stopped":  # one that was stopped goes on for a moment, to somewhere else
            with (folder / f"rank-{place.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        if (record := flight_recorder()) is not None:
            (folder / f"rank-{place.rank}.flight-recorder").write_bytes(record)
        if place.rank not in verdict.ranks:
            (folder / "verdict.json").write_text(json.dumps(verdict.as_dict(), indent=1))  # the same from every rank
            if verdict.kind in ("stopped", "hung") and (nodes := {beat.node for beat in verdict.beats if beat.node}):
                (folder / "nodes").write_text("\n".join(sorted(nodes)) + "\n")  # the job's script counts them
    if verdict.kind in ("stopped", "hung"):
        for beat in told:
            _end(beat, folder if run.exists() else None)


def _end(beat: Beat, folder: Path | None) -> None:
    """SIGUSR2 and SIGCONT, for its stacks; then SIGKILL. Several ranks of the host may do so: the first is enough."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        for number in (signal.SIGUSR2, signal.SIGCONT):
            os.kill(beat.pid, number)
        time.sleep(WORDS)
        with contextlib.suppress(OSError):
            if folder is not None and (said := Path(beat.stacks).read_text()):
                (folder / f"rank-{beat.rank}.txt").write_text(said)
        os.kill(beat.pid, signal.SIGKILL)
