"""Opening a run: its folder, data and starting point are checked by the first rank, before any model is built."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import check_vocabulary
from data.dataset import TokenDataset
from data.views import View, of_length
from minimax_train.checkpoint.commit import remove_leftovers
from minimax_train.checkpoint.mirror import claim, mirror_of
from minimax_train.checkpoint.record import Progress, Record, read_record
from minimax_train.checkpoint.shelf import check_architecture, describe, set_aside
from minimax_train.checkpoint.store import load_weights
from minimax_train.checkpoint.verify import newest_shared, open_shared
from minimax_train.convert.carried import keep
from minimax_train.engine.state import adopt_weights, optimizer_state, optimizer_steps, prepare_optimizer, set_optimizer_steps
from minimax_train.engine.storage import read_tensors
from minimax_train.engine.trainer import Trainer
from minimax_train.plan import Plan
from minimax_train.train.folder import RunFolder
from minimax_train.train.stage_rows import planned_epochs
from parallel.collectives import first_does
from parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Where the run goes on from."""

    checkpoint: Path | None
    record: Record | None
    resumed: bool
    """The checkpoint is the run's own, not one it starts from."""
    notes: list[str]

    @property
    def progress(self) -> Progress:
        return self.record.progress if self.resumed and self.record else Progress()


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run's token files, open."""

    sources: dict[str, View]
    validation: TokenDataset

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each source's file; its bounds are in the plan."""
        return {name: view.dataset.fingerprint for name, view in self.sources.items()}


def open_data(plan: Plan) -> RunData:
    """The plan's sources and held-out tokens, made first where the plan says how.

    ValueError where a file is missing or damaged, no document has a source's length, or they do not fit the model or each other.
    """
    data = plan.data
    if data.prepare == "stdlib" and data.train and not Path(data.train + ".json").exists():
        from data.standard_library import prepare_standard_library

        prepare_standard_library(Path(data.train).parent, vocabulary=plan.model.vocab_size)
    files: dict[str, TokenDataset] = {}  # several sources may be parts of one
    sources = {}
    for name, source in data.by_name.items():
        try:
            files[source.prefix] = files.get(source.prefix) or TokenDataset.open(source.prefix)
            sources[name] = of_length(files[source.prefix], source.at_least, source.below)
        except ValueError as error:
            raise ValueError(f"source {name!r}: {error}") from None
    validation = TokenDataset.open(data.validation)
    for dataset in (*files.values(), validation):
        check_vocabulary(dataset, plan.model.vocab_size)
        if dataset.sidecar.tokenizer_sha256 != validation.sidecar.tokenizer_sha256:
            raise ValueError(f"{dataset.prefix} and {validation.prefix} were made with different tokenizers: prepare both with one")
    return RunData(sources=sources, validation=validation)


def open_run(plan: Plan, folder: RunFolder, groups: Groups, overrides: Sequence[str] = ()) -> Opening:
    """Checks everything that can be checked before the model exists; all ranks call it. `overrides`: the settings of `plan` in which it may
    differ from the run's."""
    data: list[RunData] = []  # the first rank's; before the minutes that a large checkpoint's checksums take
    first_does(lambda: data.append(open_data(plan)), groups.world)
    newest, passed = newest_shared(folder.checkpoints, groups)
    start = None
    if newest is None and plan.start.checkpoint is not None:  # a run that was begun needs it no more
        start = open_shared(Path(plan.start.checkpoint), groups)
    return first_does(lambda: _open(plan, data[0], folder, start, newest, passed, overrides), groups.world)


def _open(
    plan: Plan,
    data: RunData,
    folder: RunFolder,
    start: tuple[Path, Record] | None,
    newest: Path | None,
    passed: dict[Path, str],
    overrides: Sequence[str],
) -> Opening:
    """The first rank's part of it, with what verified."""
    beginning = [] if start is None else [_check_start(plan, *start)]
    record = None if newest is None else read_record(newest)
    progress = Progress() if record is None else record.progress
    if (place := mirror_of(plan.checkpoints, folder.path)) is not None:
        claim(place, folder.path)
    notes = folder.adopt(plan, list(overrides), progress)
    notes += [f"removed {path}, left by a run that was stopped while saving" for path in remove_leftovers(folder.checkpoints)]
    notes += planned_epochs(plan, data.sources)
    folder.mark_finished(plan, progress)
    if newest is None or record is None:
        remedy = f"`checkpoint repair {folder.path}` brings back what has copies; or move them away to start again"
        if passed:
            raise ValueError(f"no checkpoint of {folder.path} verifies: {describe(passed)}; {remedy}")
        if aside := sorted(path.name for path in folder.checkpoints.glob("damaged-*")):
            raise ValueError(f"{folder.path} has no checkpoint but damaged ones ({', '.join(aside)}); {remedy}")
        checkpoint, begun = start or (None, None)
        if checkpoint is not None:
            keep(checkpoint, folder.path)
        return Opening(checkpoint=checkpoint, record=begun, resumed=False, notes=notes + beginning)
    check_architecture(record, plan.model, newest)
    _check_sources(record, data, newest)
    notes += [f"damaged checkpoint {path} ({wrong}) was set aside as {set_aside(path)}" for path, wrong in passed.items()]
    return Opening(checkpoint=newest, record=record, resumed=True, notes=[*notes, f"going on from {newest}"])


def _check_sources(record: Record, data: RunData, checkpoint: Path) -> None:
    """Refuses to go on with other tokens than those the run was reading."""
    changed = {name for name, fingerprint in data.fingerprints.items() if record.data_fingerprints.get(name) != fingerprint}
    for name, view in data.sources.items():
        if name in changed:
            raise ValueError(
                f"source {name!r}: {view.dataset.prefix} changed since {checkpoint} was written: restore it, or start a new run with "
                "start.checkpoint"
            )
    if record.progress.step and record.progress.sources.keys() != data.sources.keys():
        raise ValueError(
            f"{checkpoint} says where {', '.join(record.progress.sources) or 'no source'} stands, the plan has {', '.join(data.sources)}: "
            "it was written by another version; start a new run with start.checkpoint"
        )


def _check_start(plan: Plan, checkpoint: Path, record: Record) -> str:
    """Checks what a fresh run begins from against the plan; returns what to say of it."""
    check_architecture(record, plan.model, checkpoint)
    base = plan.stages[0].rope_base
    if base < record.rope_base:
        raise ValueError(
            f"checkpoint {checkpoint} was trained with RoPE base {record.rope_base:g}; stage {plan.stages[0].name!r} asks for {base:g}: "
            "a base may only rise when a context is extended; set stages.0.rope_base"
        )
    if plan.start.optimizer == "carry" and record.optimizer_steps is None:
        raise ValueError(f"start.optimizer is carry, but {checkpoint} holds weights only: set start.optimizer=fresh")
    note = f"beginning from {checkpoint} (step {record.progress.step}), optimizer {plan.start.optimizer}"
    raised = f"RoPE base {record.rope_base:g} -> {base:g}" if base > record.rope_base else f"RoPE base {base:g}"
    return f"{note}, {raised}"


def restore(trainer: Trainer, opening: Opening, plan: Plan) -> None:
    """Fills the trainer from the opening's checkpoint; all ranks call it."""
    checkpoint, record = opening.checkpoint, opening.record
    if checkpoint is None or record is None:
        return
    trainer.idle.forget()
    load_weights(trainer.decoder, checkpoint, record, trainer.session.groups)
    adopt_weights(trainer.optimizer)
    if record.optimizer_steps is not None and (opening.resumed or plan.start.optimizer == "carry"):
        prepare_optimizer(trainer.optimizer)
        read_tensors(optimizer_state(trainer.decoder, trainer.optimizer, trainer.session.groups), checkpoint / "tensors")
        set_optimizer_steps(trainer.optimizer, record.optimizer_steps)
        assert optimizer_steps(trainer.optimizer) == record.optimizer_steps
