"""Every rank's pulse: a thread beside the training that says how far it is, and looks whether any rank holds the others up.

Outside the collectives, which are what hangs: it talks through a store connection of its own. A verdict (see verdict.py) reaches every
rank, and each leaves with HUNG after what `on_verdict` does; the launcher then starts the job again. The process groups' own limits (see
world.py) stay behind it.
"""

import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from linecache import getline
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from parallel.groups import Groups
from parallel.stragglers import Slowest, slowest
from parallel.verdict import Beat, Jury, Verdict
from parallel.world import Place

HUNG = 70
"""Exit status of every rank when one of them holds the others up (sysexits.h: EX_SOFTWARE)."""
TICK = 0.1
"""Seconds between two looks at where the main thread is."""
STARTING = 1800.0
"""Seconds that a rank may stand still before its first phase is named: imports, and meeting the others."""
LAST = 10.0
"""Seconds in which the other ranks must end once the rank that keeps the store has."""


class Pulse:
    """One rank's. `during` says what it does; `watch` which groups' collectives count; `stragglers` who works longest."""

    def __init__(self, place: Place, limit: float = 0.0, on_verdict: Callable[[Verdict], None] = lambda _: None, stacks: str = "") -> None:
        """`limit`: seconds that a rank may stand still, 0: nobody looks; a world of one has nobody to hold up. `stacks`: see Beat."""
        self.place, self.limit, self._on_verdict, self._stacks = place, limit, on_verdict, stacks
        self.beats: dict[int, Beat] = {}
        """The newest of every rank; on the first rank alone."""
        self._before: dict[int, Beat] = {}
        self._looked = time.monotonic()
        self._work: dict[str, float] = defaultdict(float)
        self._phase, self._phase_limit, self._moves = "starting", max(limit, STARTING), 0
        self._groups: dict[str, Any] = {}
        self._main = threading.main_thread().ident or 0
        self._task = Path(f"/proc/self/task/{threading.main_thread().native_id}/stat")
        self._ended, self._named = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to beat, where there is somebody to tell."""
        if self.limit and self.place.size > 1 and self.place.address:
            self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """The last beat: this rank is not waited for any more. The first, where it keeps the store, waits a while for the others' last.
        It does not return once somebody was named: what this thread met is that others have left already."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join(None if self._named.is_set() else 2 * LAST)
            self._thread = None

    @contextmanager
    def during(self, phase: str, limit: float | None = None) -> Iterator[None]:
        """What this rank does inside the `with`; it may then stand still for `limit` seconds (None: the usual)."""
        before = self._phase, self._phase_limit
        self._enter(phase, self.limit if limit is None else max(limit, self.limit))
        try:
            yield
        finally:
            self._enter(*before)

    def _enter(self, phase: str, limit: float) -> None:
        self._phase, self._phase_limit, self._moves = phase, limit, self._moves + 1

    @contextmanager
    def watch(self, groups: Groups) -> Iterator[None]:
        """Inside the `with` the collectives of these groups count."""
        self._groups = _comparable(groups)
        try:
            yield
        finally:
            self._groups = {}  # they are about to go

    def stragglers(self, every: float = 60.0) -> list[Slowest]:
        """The slowest rank of each phase since the last look; on the first rank, once in `every` seconds, and nothing otherwise."""
        if time.monotonic() - self._looked < every:
            return []
        before, self._before, self._looked = self._before, self.beats, time.monotonic()
        return slowest(before, self._before)

    # What follows runs in the thread.

    def _run(self) -> None:
        rank, last = self.place.rank, self.place.size - 1
        watched = list(range(last + 1)) if rank == 0 else [0] if rank == last else []  # the last one looks at the first
        jury = Jury(watched, limit=self.limit, now=time.monotonic())
        try:
            verdict = self._beat_on(self._connect(), jury, watched)
        except dist.DistError as error:
            if self._ended.is_set():
                return
            keeper = "the launcher's process" if self.place.hosted else "rank 0"
            said = f"{keeper}, which keeps the store at {self.place.address}, does not answer ({' '.join(str(error).split())[:200]})"
            verdict = Verdict(kind="stopped", ranks=[] if self.place.hosted else [0], lines=[said], when=_now())
        if verdict is not None:
            self._leave(verdict)

    def _connect(self) -> dist.Store:
        assert self.place.address is not None
        address, _, port = self.place.address.rpartition(":")
        store = dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=STARTING), wait_for_workers=False)
        store.set_timeout(timedelta(seconds=max(self.limit, 1.0)))
        return dist.PrefixStore(f"pulse-{self.place.attempt}", store)

    def _beat_on(self, store: dist.Store, jury: Jury, watched: list[int]) -> Verdict | None:
        """Beats until this rank ends (None) or somebody is named."""
        period, number = min(max(self.limit / 10, TICK), 2.0), 0
        waiting, at = False, "nowhere"
        while True:
            over, number = self._ended.is_set(), number + 1
            self._say(store, number, waiting, at, over)
            verdict = self._listen(store, jury, watched)
            if verdict is not None:
                return verdict
            if over:
                self._wait_for_others(store)
                return None
            begin = time.monotonic()
            while time.monotonic() - begin < period and not self._ended.is_set():
                waiting, at = self._look()

    def _say(self, store: dist.Store, number: int, waiting: bool, at: str, over: bool) -> None:
        beat = Beat(
            rank=self.place.rank,
            host=socket.gethostname(),
            node=self.place.node,
            pid=os.getpid(),
            number=number,
            phase=self._phase,
            limit=self._phase_limit,
            counts={name: group._get_sequence_number_for_group() for name, group in self._groups.items()},
            moves=self._moves,
            waiting=waiting,
            at=at,
            effort=self._effort(),
            work={phase: round(seconds, 3) for phase, seconds in list(self._work.items())},
            stacks=self._stacks,
            over=over,
        )
        store.set(f"beat/{self.place.rank}", json.dumps(asdict(beat)))

    def _listen(self, store: dist.Store, jury: Jury, watched: list[int]) -> Verdict | None:
        """A verdict, of this rank's own or another's."""
        if store.check(["verdict"]):
            return Verdict.of(json.loads(store.get("verdict")))
        if not watched:
            return None
        there = [rank for rank in watched if rank in self.beats or store.check([f"beat/{rank}"])]
        said = store.multi_get([f"beat/{rank}" for rank in there])
        self.beats = {rank: Beat(**json.loads(one)) for rank, one in zip(there, said, strict=True)}
        now = time.monotonic()
        jury.see(self.beats, now)
        verdict = jury.judge(now)
        if verdict is not None:
            verdict = replace(verdict, when=_now())
            store.set("verdict", json.dumps(verdict.as_dict()))
        return verdict

    def _wait_for_others(self, store: dist.Store) -> None:
        """Where this process keeps the store, the others need it for their last word."""
        begin = time.monotonic()
        while self.place.rank == 0 and not self.place.hosted and time.monotonic() - begin < LAST:
            if all(json.loads(one)["over"] for one in store.multi_get([f"beat/{rank}" for rank in self.beats])):
                return
            time.sleep(TICK)

    def _leave(self, verdict: Verdict) -> None:
        """Every rank comes here, the culprit too if it can. The first stays longest: it may keep the store that tells the others."""
        self._named.set()
        try:
            self._on_verdict(verdict)
            time.sleep(max(self.limit / 5, 1.0) * (2 if self.place.rank == 0 else 1))  # the others learn of it within one beat
        finally:
            os._exit(HUNG)

    def _look(self) -> tuple[bool, str]:
        """Whether the main thread waits for other ranks, and where it is; and a TICK goes by, which counts for its phase."""
        begin = time.monotonic()
        self._ended.wait(TICK)
        frame = sys._current_frames().get(self._main)
        waiting = frame is not None and is_wait(frame)
        self._work[self._phase] += 0.0 if waiting else time.monotonic() - begin
        return waiting, place_of(frame)

    def _effort(self) -> int:
        """Grows while the main thread works. Where no /proc tells, it always does."""
        try:
            fields = self._task.read_text().rpartition(")")[2].split()
        except OSError:
            return time.monotonic_ns()
        return sum(int(fields[i - 3]) for i in (12, 14, 15, 42))  # proc(5): major faults, time in user and system mode, waits for a disk


def _now() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def _comparable(groups: Groups) -> dict[str, Any]:
    """The groups whose members enter the same collectives, by a name that all members have. Not the pipeline's: in the middle of one, ranks
    send and receive more than at its ends."""
    channels = ("expert", "expert_tensor", "expert_block", "context", "key_value", "ring")
    plain = ("world", "data", "data_context", "tensor", "tensor_context", "tensor_data_context", "expert_data")
    named = {name: getattr(groups, name) for name in plain} | {name: getattr(groups, name).group for name in channels}
    return {f"{name} of rank {dist.get_global_rank(group, 0)}": group for name, group in named.items() if group.size() > 1}


def is_wait(frame: FrameType) -> bool:
    """Whether a thread that is here waits for other ranks: inside torch.distributed, or on a line that calls a work's `wait`."""
    return "/torch/distributed/" in frame.f_code.co_filename or ".wait(" in getline(
        frame.f_code.co_filename,
        frame.f_lineno or 0,  # of a frame that another thread runs it may be None
    )


def place_of(frame: FrameType | None) -> str:
    """The innermost frame, and the innermost one outside installed packages."""
    if frame is None:
        return "nowhere"
    places = [_line(frame)]
    outer: FrameType | None = frame
    while outer is not None and ("/site-packages/" in outer.f_code.co_filename or outer.f_code.co_filename.startswith("<")):
        outer = outer.f_back
    if outer is not None and outer is not frame:
        places.append(_line(outer))
    return ", called at ".join(places)


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"


def flight_recorder() -> bytes | None:
    """NCCL's record of this rank's last collectives (a pickle, for torch's `torchfrtrace`); None without NCCL. No GPU has run this yet."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace", getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None))
    if dump is None or not dist.is_initialized() or dist.get_backend() != "nccl":
        return None
    return bytes(dump())
