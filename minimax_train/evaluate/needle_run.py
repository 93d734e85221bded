"""Needles for a run or a checkpoint: which weights, which words, and the file with what came of it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from data.needles import Words, english
from data.retrieval import vocabulary_of
from data.tokenizer import Tokenizer
from minimax_train.checkpoint.commit import replace_text
from minimax_train.checkpoint.record import Record
from minimax_train.checkpoint.verify import open_shared
from minimax_train.engine.session import Session
from minimax_train.evaluate.grid import Asked, Grid
from minimax_train.evaluate.logits import fill_decoder
from minimax_train.evaluate.needle import Cell, score
from minimax_train.evaluate.tokenizer import find_tokenizer
from minimax_train.report.canvas import png
from minimax_train.report.needle_plot import needle_plot
from minimax_train.report.needles import read_needles
from parallel.collectives import first_does
from parallel.heads import check_heads
from parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Needles:
    """What needle.json holds."""

    checkpoint: str
    step: int
    trained_length: int
    """The longest row the weights were trained on."""
    rope_base: float
    seed: int
    keys: str
    """Hidden in `multi_key`: how many, or 1/N: one for each N tokens."""
    cells: list[Cell]

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)


def evaluate_needle(path: Path, asked: Asked, tokenizer: Path | None, session: Session, told: Callable[[str], None]) -> Needles:
    """Every cell for the checkpoint `path`, or the newest of the run `path`; all ranks call it together, and all know the result.

    ValueError where there is no such checkpoint or tokenizer, or the session's layout does not fit the model.
    """

    checkpoint, record = open_shared(path, session.groups)

    def checked() -> Grid:
        check_layout(record, session.groups.layout)
        find_tokenizer(path, tokenizer, record.model)
        return asked.grid(path, record)

    grid = first_does(checked, session.groups.world)
    words = words_of(find_tokenizer(path, tokenizer, record.model))
    decoder = fill_decoder(checkpoint, record, session)
    cells = score(decoder, words, grid, session, told=told)
    return Needles(
        checkpoint=checkpoint.name,
        step=record.progress.step,
        trained_length=record.max_positions,
        rope_base=record.rope_base,
        seed=grid.seed,
        keys=str(grid.keys),
        cells=cells,
    )


def check_layout(record: Record, layout: Layout) -> None:
    """ValueError where the model cannot be shared out so."""
    record.model.check_tensor(layout.tensor)
    record.model.check_experts(layout.expert, layout.expert_tensor)
    check_heads(record.model.num_key_value_heads // layout.tensor, layout.key_value)


def words_of(tokenizer: Tokenizer) -> Words:
    """Those of its own vocabulary for a tokenizer of data.retrieval, English for any other."""
    vocabulary = vocabulary_of(tokenizer)
    return english(lambda text: tokenizer.encode([text])[0]) if vocabulary is None else vocabulary.puzzle_words(tokenizer)


def write_needles(needles: Needles, final: Path, name: str) -> None:
    """Writes `final` (needle.json) whole or not at all, in a folder that is made where it is missing, and the maps beside it as PNG."""
    final.parent.mkdir(parents=True, exist_ok=True)
    replace_text(final, needles.dump())
    figure = needle_plot(name, read_needles(json.loads(needles.dump()), final)).figure
    assert figure is not None
    final.with_suffix(".png").write_bytes(png(figure))
