"""Opening a run: its folder, data and starting point are checked by the first rank, before any model is built."""

from dataclasses import dataclass
from pathlib import Path

from data.batches import check_vocabulary
from data.dataset import TokenDataset
from minimax_train.checkpoint.commit import remove_leftovers
from minimax_train.checkpoint.record import Progress, Record
from minimax_train.checkpoint.shelf import check_architecture, describe, newest_verified, resolve, set_aside, verified_record
from minimax_train.checkpoint.store import load_weights
from minimax_train.engine.state import adopt_weights, optimizer_state, optimizer_steps, prepare_optimizer, set_optimizer_steps
from minimax_train.engine.storage import read_tensors
from minimax_train.engine.trainer import Trainer
from minimax_train.plan import Plan
from minimax_train.train.folder import RunFolder


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


def open_data(plan: Plan) -> tuple[TokenDataset, TokenDataset]:
    """Training and held-out tokens, made first where the plan says how; ValueError where they do not fit the model or each other."""
    if plan.data.prepare == "stdlib" and not Path(plan.data.train + ".json").exists():
        from data.standard_library import prepare_standard_library

        prepare_standard_library(Path(plan.data.train).parent, vocabulary=plan.model.vocab_size)
    train, validation = TokenDataset.open(plan.data.train), TokenDataset.open(plan.data.validation)
    for dataset in (train, validation):
        check_vocabulary(dataset, plan.model.vocab_size)
    if train.sidecar.tokenizer_sha256 != validation.sidecar.tokenizer_sha256:
        raise ValueError(f"{plan.data.train} and {plan.data.validation} were made with different tokenizers: prepare both with one")
    return train, validation


def open_run(plan: Plan, folder: RunFolder) -> Opening:
    """Checks everything that can be checked before the model exists. Called by the first rank, for all."""
    train, _ = open_data(plan)
    start = _start(plan)  # before the folder is touched: bad input leaves nothing behind
    folder.adopt(plan)
    notes = [f"removed {path}, left by a run that was stopped while saving" for path in remove_leftovers(folder.checkpoints)]
    newest, passed = newest_verified(folder.checkpoints)
    if newest is None:
        if passed:
            raise ValueError(f"no checkpoint of {folder.path} verifies: {describe(passed)}; move them away to start again")
        return Opening(checkpoint=start[0], record=start[1], resumed=False, notes=notes + start[2])
    record = verified_record(newest)
    check_architecture(record, plan.model, newest)
    if record.data_fingerprint != train.fingerprint:
        raise ValueError(f"{plan.data.train} changed since {newest} was written: restore it, or start a new run with start.checkpoint")
    notes += [f"damaged checkpoint {path} ({wrong}) was set aside as {set_aside(path)}" for path, wrong in passed.items()]
    return Opening(checkpoint=newest, record=record, resumed=True, notes=[*notes, f"going on from {newest}"])


def _start(plan: Plan) -> tuple[Path | None, Record | None, list[str]]:
    """The checkpoint a fresh run begins from, checked against the plan."""
    if plan.start.checkpoint is None:
        return None, None, []
    checkpoint = resolve(Path(plan.start.checkpoint))
    record = verified_record(checkpoint)
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
    return checkpoint, record, [f"{note}, {raised}"]


def restore(trainer: Trainer, opening: Opening, plan: Plan) -> None:
    """Fills the trainer from the opening's checkpoint; all ranks call it."""
    checkpoint, record = opening.checkpoint, opening.record
    if checkpoint is None or record is None:
        return
    load_weights(trainer.decoder, checkpoint, record, trainer.session.groups)
    adopt_weights(trainer.optimizer)
    if record.optimizer_steps is not None and (opening.resumed or plan.start.optimizer == "carry"):
        prepare_optimizer(trainer.optimizer)
        read_tensors(optimizer_state(trainer.decoder, trainer.optimizer), checkpoint / "tensors")
        set_optimizer_steps(trainer.optimizer, record.optimizer_steps)
        assert optimizer_steps(trainer.optimizer) == record.optimizer_steps
