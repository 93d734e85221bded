"""Whether a Hugging Face folder is sound, and whether it is the model of a checkpoint: by its numbers, and by what it computes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.workers import each
from minimax_train.checkpoint.record import model_differences
from minimax_train.convert.cast import is_finite
from minimax_train.convert.pieces import pieces
from minimax_train.convert.source import SourceReader, dtype_names, open_source, some
from minimax_train.convert.stored import StoredModel
from minimax_train.convert.table import Entry, Part
from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stages
from minimax_train.evaluate.logits import read_input_ids
from minimax_train.model.config import ModelConfig
from minimax_train.model.decoder import Decoder
from minimax_train.model.row import Row

TOLERANCE = 2e-6
"""Relative error of fp32 logits between two right implementations: 3e-7 to 4e-7 were seen up to 16 layers."""
Whole = Callable[[Entry], Tensor]
"""Reads one of our parameters whole."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a comparison found."""

    same: bool
    lines: list[str]


class Verifier:
    """A folder whose index, names, shapes and configuration hold: making one raises ValueError otherwise."""

    def __init__(self, folder: Path, *, workers: int = 1) -> None:
        self.source, self.workers = open_source(folder), workers
        self.parts = [(entry, part) for entry in self.source.entries for part in entry.parts]

    def alone(self) -> str:
        """Reads every number. ValueError listing tensors with NaN or infinity; else what the folder holds, in a line."""
        bad = self._where(lambda reader, entry, part: any(not is_finite(x) for x in _pieces(reader, entry, part)))
        if bad:
            raise ValueError(f"{self.source.folder}: NaN or infinity in {some(bad)}")
        places = self.source.tensors.values()
        files, size = {place.path for place in places}, sum(place.size for place in places)
        held = f"{len(self.parts):,} tensors in {len(files):,} files, {size:,} bytes of {dtype_names({place.dtype for place in places})}"
        sound = "index, names and shapes are those of its configuration, every number is finite"
        return f"{self.source.folder}: {self.source.described.format} format, {held}; {sound}"

    def against(self, model: StoredModel, session: Session, ids: Tensor, *, layers: bool) -> Iterator[Outcome]:
        """The comparisons with a checkpoint, one after the other: its tensors, and its logits where the two are one architecture."""
        found = self.tensors(model)
        yield found
        if model.record.model == self.source.described.model:
            yield self.computes(model, session, ids, layers=layers)

    def tensors(self, model: StoredModel) -> Outcome:
        """Every tensor against the checkpoint's: equal to the bit, or to the bit after the cast that the dtypes tell of."""
        theirs, ours = self.source.described, model.record
        facts = model_differences(theirs.model, ours.model)
        if theirs.rope_base != ours.rope_base:
            facts.append(f"rope_base: {ours.rope_base:g} -> {theirs.rope_base:g}")
        if facts:
            return Outcome(same=False, lines=[f"another model than {model.folder} (checkpoint -> folder): {'; '.join(facts)}"])
        list(each(lambda job: job.run(), model.checks(), workers=self.workers))

        def differs(reader: SourceReader, entry: Entry, part: Part) -> bool:
            with model.reader() as stored:
                dtype = _narrower(self.source.tensors[part.name].dtype, model.stored[entry.name].dtype)
                return any(
                    not _same_bits(reader.piece(part, piece).to(dtype), stored.piece(entry, piece).to(dtype))
                    for piece in pieces(entry, part, 4)
                )

        wrong = self._where(differs)
        if wrong:
            return Outcome(same=False, lines=[f"{len(self.parts) - len(wrong):,} tensors are equal, these differ: {some(wrong)}"])
        casts = {(model.stored[entry.name].dtype, self.source.tensors[part.name].dtype) for entry, part in self.parts}
        cast = "".join(f", {a} cast to {b}" for a, b in sorted(casts, key=str) if a != b)
        return Outcome(same=True, lines=[f"all {len(self.parts):,} tensors are those of {model.folder} to the bit{cast}"])

    def computes(self, model: StoredModel, session: Session, ids: Tensor, *, layers: bool) -> Outcome:
        """Logits of both in fp32, a layer of each in memory at a time; names the first layer after which they differ."""
        with ExitStack() as stack:
            reader, stored = stack.enter_context(SourceReader(self.source)), stack.enter_context(model.reader())

            def narrower(entry: Entry) -> torch.dtype:
                return _narrower(self.source.tensors[entry.parts[0].name].dtype, model.stored[entry.name].dtype)

            def ours(entry: Entry) -> Tensor:
                """Cast as the folder is, so that what is left to differ is wrong."""
                dtype = narrower(entry)
                return _assemble(entry, lambda part: (stored.piece(entry, piece).to(dtype) for piece in pieces(entry, part, 4)))

            def theirs(entry: Entry) -> Tensor:
                dtype = narrower(entry)
                return _assemble(entry, lambda part: (x.to(dtype) for x in _pieces(reader, entry, part)))

            bases = (model.record.rope_base, self.source.described.rope_base)
            runs = [
                _run(session, model.record.model, base, self.source.entries, whole, ids)
                for base, whole in zip(bases, (ours, theirs), strict=True)
            ]
            steps = [(place, _relative(a, b)) for (place, a), (_, b) in zip(*runs, strict=True)]
        return told(steps, layers=layers, tokens=ids.numel())

    def elsewhere(self, session: Session, ids: Tensor, *, layers: bool) -> Outcome:
        """Logits of the folder in fp32 by our model and by transformers' own, which reads the folder itself and runs no code of it.
        ValueError where transformers does not know the format."""
        described = self.source.described
        if described.format != "minimax":
            raise ValueError(f"{self.source.folder} is in {described.format} format: transformers runs an export --format minimax")
        expected = _by_transformers(self.source.folder, ids)
        with SourceReader(self.source) as reader:
            whole = partial(_from_source, reader)
            run = _run(session, described.model, described.rope_base, self.source.entries, whole, ids)
            steps = [(place, _relative(expected[place], x)) for place, x in run if place in expected]
        return told(steps, layers=layers, tokens=ids.numel(), agree=TOLERANCE, who="by transformers and by this model")

    def _where(self, found: Callable[[SourceReader, Entry, Part], bool]) -> list[str]:
        """The names of the tensors for which `found` holds."""

        def look(first: int) -> list[str]:
            with SourceReader(self.source) as reader:
                return [part.name for entry, part in self.parts[first :: len(jobs)] if found(reader, entry, part)]

        jobs = range(min(len(self.parts), 8 * self.workers))
        return sorted(name for names in each(look, jobs, workers=self.workers) for name in names)


def told(steps: list[tuple[str, float]], *, layers: bool, tokens: int, agree: float = 0.0, who: str = "of both") -> Outcome:
    """A comparison, step by step, in words: the last step is the logits; errors up to `agree` are none."""
    lines = [f"after {place}: {'equal' if error == 0 else f'{error:.1e} relative'}" for place, error in steps] if layers else []
    first = next((place for place, error in steps if not error <= agree), None)
    logits = f"logits of {tokens:,} tokens {who}"
    if first is None:
        worst = max(error for _, error in steps)
        return Outcome(same=True, lines=[*lines, f"{logits} {'are equal to the bit' if worst == 0 else f'agree to {steps[-1][1]:.1e}'}"])
    return Outcome(same=False, lines=[*lines, f"{logits} differ by {steps[-1][1]:.1e} relative; the first to differ: {first}"])


def choose_ids(path: Path | None, tokens: int, config: ModelConfig) -> Tensor:
    """`[B, T]` from a file, or `tokens` random ids."""
    if path is not None:
        return read_input_ids(path, config.vocab_size)
    return torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))


def _pieces(reader: SourceReader, entry: Entry, part: Part) -> Iterator[Tensor]:
    return (reader.piece(part, piece) for piece in pieces(entry, part, 4))


def _from_source(reader: SourceReader, entry: Entry) -> Tensor:
    return _assemble(entry, lambda part: _pieces(reader, entry, part))


def _assemble(entry: Entry, read: Callable[[Part], Iterator[Tensor]]) -> Tensor:
    """One of our parameters whole, fp32, from the pieces of its parts."""
    whole = torch.empty(entry.shape)
    for part in entry.parts:
        box = whole[tuple(slice(low, low + size) for low, size in zip(part.offset, part.box, strict=True))]
        box.copy_(torch.cat([x.to(torch.float32, copy=True) for x in read(part)]).view(part.box))
    return whole


@torch.no_grad()
def _run(
    session: Session, config: ModelConfig, rope_base: float, entries: list[Entry], whole: Whole, ids: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The hidden state after the embedding and after each layer, and at last the logits, of every row of ids."""
    rows = [Row.of_documents([row]) for row in ids]
    by_name = {entry.name: entry for entry in entries}
    xs: list[Tensor] = []
    for layer in range(config.num_layers):
        (stage,) = build_stages(config, session, (range(layer, layer + 1),), dtype="fp32", seed=None, rope_base=rope_base)
        decoder: Decoder = bare(stage).eval()
        for name, parameter in decoder.named_parameters():
            parameter.copy_(whole(by_name[name]))
        if layer == 0:
            xs = [decoder.embedding(row.tokens) for row in rows]
            yield "the embedding", torch.stack(xs)
        xs = [decoder.hidden(x, row)[0] for x, row in zip(xs, rows, strict=True)]
        yield f"layer {layer}", torch.stack(xs)
    yield "the head", torch.stack([decoder.head(decoder.norm(x)) for x in xs])


@torch.no_grad()
def _by_transformers(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    """What transformers has at the places of _run, but after the last layer, which it norms first."""
    try:
        from transformers import MiniMaxForCausalLM
    except ImportError:
        raise ValueError("--transformers needs the package transformers 5: install it beside this one") from None
    model = MiniMaxForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    out = model.eval()(ids, attention_mask=torch.ones_like(ids), use_cache=False, output_hidden_states=True)
    hidden = {f"layer {layer}": x for layer, x in enumerate(out.hidden_states[1:-1])}
    return {"the embedding": out.hidden_states[0], **hidden, "the head": out.logits}


def _narrower(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The one with fewer bits, in which two tensors of which one is a cast of the other are equal."""
    return min(one, other, key=lambda dtype: dtype.itemsize)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Unlike torch.equal, for which 0.0 is -0.0."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return 0.0 if torch.equal(ours, theirs) else float((ours - theirs).norm() / ours.norm())
