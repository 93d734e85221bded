"""Needles for a run or a checkpoint: which weights, which words, and the file with what came of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.needles import TASKS, Task, Words, english
from data.retrieval import vocabulary_of
from data.tokenizer import Tokenizer
from minimax_train.checkpoint.record import Record
from minimax_train.checkpoint.shelf import resolve, verified_record
from minimax_train.engine.session import Session
from minimax_train.evaluate.logits import fill_decoder
from minimax_train.evaluate.needle import Cell, Grid, score
from minimax_train.evaluate.tokenizer import find_tokenizer, run_of
from minimax_train.train.folder import replace_text
from parallel.collectives import first_does
from parallel.heads import check_heads
from parallel.layout import Layout

DEPTHS = 5


@dataclass(frozen=True, kw_only=True)
class Needles:
    """What needle.json holds."""

    checkpoint: str
    step: int
    trained_length: int
    """The longest row the weights were trained on."""
    rope_base: float
    seed: int
    cells: list[Cell]

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A grid, but for what the run or the checkpoint says."""

    lengths: tuple[int, ...] | None = None
    """None: of the run's stages, or the longest row the checkpoint was trained on."""
    depths: tuple[float, ...] = tuple(i / (DEPTHS - 1) for i in range(DEPTHS))
    tasks: tuple[Task, ...] = TASKS
    samples: int = 8
    seed: int = 1234

    def grid(self, path: Path, record: Record) -> Grid:
        """Complete. ValueError for what cannot be asked."""
        run = run_of(path)
        of_run = () if run is None else tuple(dict.fromkeys(stage.length for stage in run.load_plan().stages))
        lengths = self.lengths or of_run or (record.max_positions,)
        return Grid(tasks=self.tasks, lengths=lengths, depths=self.depths, samples=self.samples, seed=self.seed)


def evaluate_needle(path: Path, asked: Asked, tokenizer: Path | None, session: Session, told: Callable[[str], None]) -> Needles:
    """Every cell for the checkpoint `path`, or the newest of the run `path`; all ranks call it together, and all know the result.

    ValueError where there is no such checkpoint or tokenizer, or the session's layout does not fit the model.
    """

    def opened() -> tuple[Path, Record, Grid]:
        checkpoint = resolve(path)
        record = verified_record(checkpoint)
        check_layout(record, session.groups.layout)
        find_tokenizer(path, tokenizer, record.model)
        return checkpoint, record, asked.grid(path, record)

    checkpoint, record, grid = first_does(opened, session.groups.world)
    words = words_of(find_tokenizer(path, tokenizer, record.model))
    decoder = fill_decoder(checkpoint, record, session)
    cells = score(decoder, words, grid, session, told=told)
    return Needles(
        checkpoint=checkpoint.name,
        step=record.progress.step,
        trained_length=record.max_positions,
        rope_base=record.rope_base,
        seed=grid.seed,
        cells=cells,
    )


def check_layout(record: Record, layout: Layout) -> None:
    """ValueError where the model cannot be shared out so, or its layers would be."""
    if layout.pipeline > 1:
        raise ValueError(f"layout.pipeline is {layout.pipeline}; needles need all layers on each rank: use layout.context, tensor or expert")
    record.model.check_tensor(layout.tensor)
    record.model.check_experts(layout.expert, layout.expert_tensor)
    check_heads(record.model.num_key_value_heads // layout.tensor, layout.key_value)


def words_of(tokenizer: Tokenizer) -> Words:
    """Those of its own vocabulary for a tokenizer of data.retrieval, English for any other."""
    vocabulary = vocabulary_of(tokenizer)
    return english(lambda text: tokenizer.encode([text])[0]) if vocabulary is None else vocabulary.puzzle_words(tokenizer)


def numbers_of(text: str) -> tuple[int, ...]:
    """2048,8192 -> lengths. ValueError for what is none."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--lengths is {text!r}; write lengths in tokens, such as 2048,8192") from None


def depths_of(text: str) -> tuple[float, ...]:
    """5 -> as many depths, from 0 to 1 (1: the middle); 0,0.5,1 -> these. ValueError for what is neither."""
    try:
        if text.isdecimal() and int(text) > 0:
            count = int(text)
            return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.5,)
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--depths is {text!r}; write how many, such as 5, or depths from 0 to 1, such as 0,0.5,1") from None


def tasks_of(names: Sequence[str]) -> tuple[Task, ...]:
    """Names -> tasks. ValueError for another."""
    known = {str(task): task for task in TASKS}
    for name in names:
        if name not in known:
            raise ValueError(f"--tasks names {name!r}; choose from {','.join(TASKS)}")
    return tuple(known[name] for name in names)


def write_needles(needles: Needles, final: Path) -> None:
    """Writes needle.json whole or not at all, in a folder that is made where it is missing."""
    final.parent.mkdir(parents=True, exist_ok=True)
    replace_text(final, needles.dump())
