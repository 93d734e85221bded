"""What is asked of a run or a checkpoint: tasks, lengths, depths, samples. Loads nothing of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from data.needles import KEYS, TASKS, Sample, Task, Words, make_sample
from minimax_train.checkpoint.record import Record
from minimax_train.evaluate.tokenizer import run_of
from minimax_train.recipe import load_layout
from parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Keys:
    """How many keys `multi_key` hides: `count`, or where there is `every`, one for each so many tokens of length, at least one."""

    count: int = KEYS
    every: int | None = None

    def at(self, length: int) -> int:
        """At this length."""
        return self.count if self.every is None else max(1, length // self.every)

    def __str__(self) -> str:
        return str(self.count) if self.every is None else f"1/{self.every}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is asked. Lengths in tokens; depths from 0 (before all filler) to 1 (right before the question)."""

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    keys: Keys = Keys()

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task {task!r} is unknown; choose from {', '.join(TASKS)}")
        if not self.tasks or not self.lengths or not self.depths:
            raise ValueError(f"tasks, lengths and depths are {self.tasks}, {self.lengths} and {self.depths}; each needs at least one")
        if min(self.lengths) < 1 or self.samples < 1:
            raise ValueError(f"lengths are {self.lengths}, samples {self.samples}; each must be at least 1")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths are {self.depths}; each must be from 0 to 1")
        for name in ("tasks", "lengths", "depths"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} are {getattr(self, name)}; say each once")

    def sample(self, words: Words, task: Task, length: int, depth: float, number: int) -> Sample:
        """The same whatever else is asked, and on every machine."""
        draw = Random(f"{self.seed}/{task}/{length}/{depth}/{number}")
        return make_sample(task, words, length=length, depth=depth, draw=draw, keys=self.keys.at(length))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A grid, but for what the run or the checkpoint says."""

    lengths: tuple[int, ...] | None = None
    """None: of the run's stages, or the longest row the checkpoint was trained on."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    tasks: tuple[Task, ...] = TASKS
    samples: int = 8
    seed: int = 1234
    keys: Keys = Keys()

    def grid(self, path: Path, record: Record) -> Grid:
        """Complete. ValueError for what cannot be asked."""
        run = run_of(path)
        of_run = () if run is None else tuple(dict.fromkeys(stage.length for stage in run.load_plan().stages))
        lengths = self.lengths or of_run or (record.max_positions,)
        return Grid(tasks=self.tasks, lengths=lengths, depths=self.depths, samples=self.samples, seed=self.seed, keys=self.keys)


def layout_of(settings: Sequence[str]) -> Layout:
    """--set layout.NAME=N ... -> the layout. ValueError for another field, and for one that cuts the layers."""
    layout = load_layout(settings)
    if layout.pipeline > 1:
        raise ValueError(f"layout.pipeline is {layout.pipeline}; needles need all layers on a rank: use layout.context, tensor or expert")
    return layout


def lengths_of(text: str) -> tuple[int, ...]:
    """2048,8192 -> lengths. ValueError for what is none."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--lengths is {text!r}; write lengths in tokens, such as 2048,8192") from None


def depths_of(text: str) -> tuple[float, ...]:
    """5 -> as many depths, from 0 to 1 (1: the middle); 0,0.5,1 -> these. ValueError for what is neither."""
    try:
        if text.isdecimal():
            count = int(text)
            if not count:
                raise ValueError
            return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.5,)
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--depths is {text!r}; write how many, such as 5, or depths from 0 to 1, such as 0,0.5,1") from None


def keys_of(text: str) -> Keys:
    """4 -> so many keys; 1/64 -> one for each 64 tokens. ValueError for what is neither."""
    one, slash, every = text.partition("/")
    if not one.isdecimal() or int(one) < 1 or slash and (one != "1" or not every.isdecimal() or int(every) < 1):
        raise ValueError(f"--keys is {text!r}; write how many, such as 4, or 1/64: one for each 64 tokens of length")
    return Keys(every=int(every)) if slash else Keys(count=int(one))


def tasks_of(names: Sequence[str]) -> tuple[Task, ...]:
    """Names -> tasks. ValueError for another."""
    known = {str(task): task for task in TASKS}
    for name in names:
        if name not in known:
            raise ValueError(f"--tasks names {name!r}; choose from {','.join(TASKS)}")
    return tuple(known[name] for name in names)
