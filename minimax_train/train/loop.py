"""The training loop, top to bottom: open the run, go through the stages, write what happened."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from data.sampler import Sampler
from minimax_train.checkpoint.mirror import Mirror, mirror_of
from minimax_train.checkpoint.record import Progress, Record
from minimax_train.checkpoint.shelf import folder_of, prune
from minimax_train.engine.session import Session
from minimax_train.engine.state import model_state, optimizer_state, optimizer_steps
from minimax_train.engine.trainer import StepReport, Trainer
from minimax_train.model.count import training_flops
from minimax_train.plan import Plan, Stage
from minimax_train.train.facts import facts
from minimax_train.train.figures import data_figures, place_figures, speed_figures, step_figures, validation_figures
from minimax_train.train.folder import RunFolder, owned
from minimax_train.train.guard import Watch
from minimax_train.train.metrics import Metrics
from minimax_train.train.pause import Pause
from minimax_train.train.peak import peak_of
from minimax_train.train.profile import profiled
from minimax_train.train.resume import Opening, open_data, open_run, restore
from minimax_train.train.rewind import Rewind, rewind
from minimax_train.train.rows import to_row
from minimax_train.train.saving import Saver, Votes
from minimax_train.train.schedule import learning_rate
from minimax_train.train.stage_rows import stage_sampler
from minimax_train.train.validate import score, validation_rows
from parallel.collectives import all_sum, first_does
from parallel.pulse import Pulse
from parallel.stragglers import SLOW, Slowest
from parallel.world import PATIENCE


def train(
    plan: Plan,
    run: Path,
    session: Session,
    *,
    through: int | None = None,
    profile: bool = False,
    overrides: Sequence[str] = (),
    pause: Pause | None = None,
    pulse: Pulse | None = None,
) -> Progress:
    """Runs the plan's stages in `run`, from its newest good checkpoint; returns where it stopped. All ranks call it.

    It stops before a stage of another layout than the session's, and after stage number `through`. `overrides`: see override.py. Once
    `pause` is asked for on any rank, it saves after the step and returns. `pulse` hears what is being done.

    ValueError on bad input, before anything is written; OSError when the disk refuses a checkpoint; FloatingPointError when the loss
    or the gradient stops being a number.
    """
    pulse = pulse or Pulse(session.place)
    with ExitStack() as stack:
        stack.enter_context(pulse.watch(session.groups))
        stack.enter_context(pulse.during("opening the run", PATIENCE.total_seconds()))
        folder, last = RunFolder(run), len(plan.stages) - 1 if through is None else through
        first_does(lambda: _own(stack, run), session.groups.world)
        opening = open_run(plan, folder, session.groups, overrides)
        if plan.layout_of(opening.progress.stage) != session.groups.layout:
            return opening.progress
        progress = _Run(plan, folder, session, opening, pause, pulse).go(last, profile=profile)
        first_does(lambda: folder.mark_finished(plan, progress), session.groups.world)
        return progress


def _own(stack: ExitStack, run: Path) -> None:
    existed = run.exists()
    stack.enter_context(owned(run))
    if not existed:
        stack.callback(_remove_if_unused, run)


def _remove_if_unused(run: Path) -> None:
    """A folder that only bad input made goes away again."""
    if [p.name for p in run.iterdir()] == ["lock"]:
        (run / "lock").unlink()
        run.rmdir()


class _Run:
    """One process's part in a run: the state that goes through the loop."""

    def __init__(self, plan: Plan, folder: RunFolder, session: Session, opening: Opening, pause: Pause | None, pulse: Pulse) -> None:
        self.plan, self.folder, self.session, self.pause, self.pulse = plan, folder, session, pause, pulse
        self.paused = False
        self.fresh = True
        """The first step of a process may compile kernels, which takes long."""
        self.data = open_data(plan)
        lengths = {stage.length for stage in plan.stages}
        self.held_out = {length: validation_rows(self.data.validation, length, plan.validation.tokens) for length in lengths}
        self.trainer = Trainer(plan, session)
        restore(self.trainer, opening, plan)
        self.progress = opening.progress
        self.saver = Saver(session.groups, self._committed, self._not_saved)
        self.not_saved: str | None = None
        """What is said of a save that failed, on the line of the next step."""
        self.peak = peak_of(session, torch.bfloat16 if plan.precision == "bf16" else torch.float32)
        self.metrics: Metrics | None = None
        self.rewound: dict[str, Any] | None = None
        """What is said of going back, on the line of the next step."""
        self.mirror: Mirror | None = None
        self.last: Path | None = None
        """The last checkpoint that this process committed; the first rank's."""
        if session.is_first:
            self.folder.write_facts(facts(self.trainer, self.peak, self.held_out))
            self.metrics = Metrics(folder, step=self.progress.step, total_steps=plan.total_steps)
            backends, uneven = self.trainer.decoders[0].backends, plan.cut(session.groups.layout).warning
            notes = [*opening.notes, f"attention backends: lightning {backends.lightning}, softmax {backends.softmax}"]
            for note in [*notes, *([uneven] if uneven else [])]:
                self.metrics.say(note)
            if (place := mirror_of(plan.checkpoints, folder.path)) is not None:
                self.mirror = Mirror(place, plan.checkpoints, self.metrics.say)
                if opening.resumed and opening.checkpoint is not None:  # the run may have been stopped before it was copied
                    self.mirror.copy(opening.checkpoint)

    def go(self, through: int, *, profile: bool) -> Progress:
        """Every stage that is left, up to `through`, as long as the layout stays the same."""
        with ExitStack() as stack:
            if self.metrics is not None:
                stack.callback(self.metrics.close)
            stack.callback(self.saver.close)
            if self.mirror is not None:
                stack.callback(self.mirror.close)
            tick = stack.enter_context(profiled(self.folder.path, self.session.place.rank, wanted=profile))
            layout, total = self.session.groups.layout, self.plan.total_steps
            while (
                not self.paused
                and self.progress.stage <= through
                and self.progress.step < total
                and self.plan.layout_of(self.progress.stage) == layout
            ):
                self._stage(self.plan.stages[self.progress.stage], tick)
            if self.plan.checkpoints.mirror is not None and not self.paused:  # where a stop was asked for there is no time
                with self.pulse.during("copying checkpoints", PATIENCE.total_seconds()):
                    first_does(self._finish_copies, self.session.groups.world)
        return self.progress

    def _finish_copies(self) -> None:
        assert self.mirror is not None
        self.mirror.finish(PATIENCE.total_seconds() / 2)
        if self.last is not None:
            self._prune()  # what had to stay as long as it was copied

    def _stage(self, stage: Stage, tick: Any) -> None:
        """The steps that are left of one stage."""
        for decoder in self.trainer.decoders:
            decoder.rope_base, decoder.recompute = stage.rope_base, stage.recompute
        data = self.session.groups.data
        if self.progress.step == 0:
            self._validate(stage)
        with stage_sampler(
            self.plan, self.progress.stage, self.data.sources, self.progress.sources, rank=data.rank(), ranks=data.size()
        ) as sampler:
            number = self.progress.stage
            while self.progress.stage == number and self.progress.step < self.plan.total_steps and not self.paused:
                with self.pulse.during("a step", PATIENCE.total_seconds() if self.fresh else None), self._enough_memory(stage):
                    self._step(stage, sampler)
                self.fresh = False
                tick()
                if broken := self.progress.refused > self.plan.guard.most:
                    with self.pulse.during("going back", PATIENCE.total_seconds()):
                        self._go_back()
                with self.pulse.during("between steps"):
                    if not broken:
                        self._after_step(stage)
                    self._look_around(stage)

    def _step(self, stage: Stage, sampler: Sampler) -> None:
        """One optimizer step, and its line."""
        begin, step = time.perf_counter(), self.progress.stage_step
        before, size = sampler.bookmarks, stage.batch_at(step)
        samples = [next(sampler) for _ in range(size // stage.length // self.session.groups.data.size())]
        names = list(self.data.sources)
        rows = [to_row(sample.row, self.session, names.index(sample.source)) for sample in samples]
        rate = learning_rate(stage, step)
        p, guard = self.progress, self.plan.guard
        watch = Watch(norms=p.norms, losses=p.losses, refused=p.refused)
        check = bool(guard.checksum_every) and (self._saves(stage, step + 1, p.step + 1) or (p.step + 1) % guard.checksum_every == 0)
        report = self.trainer.step(rows, rate, lambda loss, norm: watch.judge(guard, loss, norm), check=check)
        after, watch = sampler.bookmarks, watch.after(guard, report.loss, report.grad_norm, report.refusal)
        self.progress = replace(
            p,
            step=p.step + 1,
            stage_step=p.stage_step + 1,
            tokens=p.tokens + size,
            sources=after,
            norms=watch.norms,
            losses=watch.losses,
            refused=watch.refused,
        )
        figures = {"lr": rate, "batch_tokens": size, **data_figures(size, before, after, self.data)}
        if report.refusal is not None:  # with where its rows came from: to look at, or to leave out
            rows_of = {name: asdict(bookmark) for name, bookmark in before.items()}
            figures["refused"] = {"reason": report.refusal, "ranks": report.blamed, "rows": rows_of}
        if self.not_saved is not None:
            figures["save_failed"], self.not_saved = self.not_saved, None
        figures["save_stall_seconds"] = round(self.saver.stall(), 4)
        if self.rewound is not None:
            figures["rewound"], self.rewound = self.rewound, None
        if slow := self.pulse.stragglers():
            figures["stragglers"] = [asdict(one) | {"score": round(one.score, 3)} for one in slow]
            self._tell_slow(slow)
        self._write_step(stage, report, size, time.perf_counter() - begin, figures)

    def _tell_slow(self, slow: Sequence[Slowest]) -> None:
        for one in slow:
            if self.metrics is not None and one.score < SLOW:
                self.metrics.say(f"a slow rank? {one}")

    @contextmanager
    def _enough_memory(self, stage: Stage) -> Iterator[None]:
        """MemoryError that says where and what to do, for torch's."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            rank, step, free = self.session.place.rank, self.progress.step + 1, " ".join(str(error).split())
            raise MemoryError(
                f"rank {rank} ran out of memory in step {step} (stage {stage.name}, {stage.length:,} tokens a row): layout.context, "
                f"layout.tensor or stages.N.recompute=full takes less; `plan RECIPE --gpus N` says how much. torch: {free}"
            ) from error

    def _look_around(self, stage: Stage) -> None:
        """Commits the save in flight where every rank's part is written. Saves and stops where any rank was asked to: ranks hear of it at
        different moments, and must stop behind the same step."""
        ours = self.saver.votes()
        said = [float(self.pause is not None and self.pause.asked), ours.busy, ours.failed]
        asked, busy, failed = all_sum(torch.tensor(said, device=self.session.device), self.session.groups.world).tolist()
        with self.pulse.during("saving", PATIENCE.total_seconds()):
            self.saver.count(Votes(busy=busy, failed=failed))
        if self.mirror is not None:
            self.mirror.look()
        if asked:
            self.paused = True
            self._save(stage, ended=False)
            if self.metrics is not None:
                self.metrics.say(f"stopping after step {self.progress.step}, as asked: called again, the run goes on from there")

    def _go_back(self) -> None:
        """After too many refused steps: weights and moments of the last checkpoint before them; the rows since then are left out."""
        self.saver.wait()
        stopped, went_back, most = self.progress.step, self.progress.rewinds, self.plan.guard.rewinds
        reason = f"{self.progress.refused} steps in a row were not applied, more than guard.most"
        back: Rewind | None = None
        if went_back < most:
            back = first_does(lambda: rewind(self.folder.checkpoints, self.progress), self.session.groups.world)
        if back is None:
            spent = f"guard.rewinds allows {most} returns to a checkpoint in a stage, and it made {went_back}"
            why = spent if went_back >= most else "the stage has no intact checkpoint before them"
            raise FloatingPointError(
                f"step {stopped}: {reason}, and {why}. Look at `refused` in metrics.jsonl, then go on from the last "
                "checkpoint with a lower learning rate or other data"
            )
        self.trainer.settle()
        restore(self.trainer, Opening(checkpoint=back.checkpoint, record=back.record, resumed=True, notes=[]), self.plan)
        self.progress, self.rewound = back.progress, back.figures(stopped=stopped, reason=reason)
        if self.metrics is not None:
            kept = self.metrics.go_back(back.progress.step, back.progress.rewinds)
            self.metrics.say(f"step {stopped}: {reason}; going back to {back.checkpoint}, without the rows since. Lines: {kept}")

    def _after_step(self, stage: Stage) -> None:
        """Validation and checkpoint where they are due; at a stage's end the next one's turn comes."""
        step, ended = self.progress.step, self.progress.stage_step == stage.steps
        last = step == self.plan.total_steps
        if ended or last or step % self.plan.validation.every_steps == 0:
            self._validate(stage)
        if ended:
            sources = {name: bookmark.next_stage() for name, bookmark in self.progress.sources.items()}
            self.progress = replace(
                self.progress, stage=self.progress.stage + 1, stage_step=0, sources=sources, norms=(), losses=(), refused=0, rewinds=0
            )
        if self._saves(stage, stage.steps if ended else 0, step):
            self._save(stage, ended=ended)

    def _saves(self, stage: Stage, stage_step: int, step: int) -> bool:
        """Whether a checkpoint is due behind this step."""
        return stage_step == stage.steps or step == self.plan.total_steps or step % self.plan.checkpoints.every_steps == 0

    def _save(self, stage: Stage, *, ended: bool) -> None:
        final, last = folder_of(self.folder.checkpoints, self.progress.step), self.progress.step == self.plan.total_steps
        with self.pulse.during("saving", PATIENCE.total_seconds()):
            must = ended or last or self.paused or not self.plan.checkpoints.asynchronous
            if must:
                self.saver.wait()
            if not first_does(final.exists, self.session.groups.world):  # it may be there: a resumed run that had nothing left to do
                self._write(final, stage, ended=ended, wait=must)

    def _write(self, final: Path, stage: Stage, *, ended: bool, wait: bool) -> None:
        self.trainer.settle()
        decoder, optimizer = self.trainer.decoder, self.trainer.optimizer
        record = Record(
            model=self.plan.model,
            rope_base=stage.rope_base,
            max_positions=max(s.length for s in self.plan.stages[: self.plan.stages.index(stage) + 1]),
            precision=self.plan.precision,
            progress=self.progress,
            optimizer_steps=optimizer_steps(optimizer),
            data_fingerprints=self.data.fingerprints,
            stage_end=ended,
        )
        state = model_state(decoder, self.session.groups) | optimizer_state(decoder, optimizer, self.session.groups)
        self.saver.begin(final, state, record, wait=wait)

    def _committed(self, checkpoint: Path) -> None:
        if self.session.is_first:
            self.last = checkpoint
            if self.mirror is not None:
                self.mirror.copy(checkpoint)
            self._prune()

    def _prune(self) -> None:
        keep, needed = self.plan.checkpoints, set() if self.mirror is None else self.mirror.needed
        prune(self.folder.checkpoints, keep.keep, keep.keep_every_tokens, verified=self.last, needed=needed)

    def _not_saved(self, why: str) -> None:
        self.not_saved = why
        if self.metrics is not None:
            self.metrics.say(f"{why}; training goes on")

    def _validate(self, stage: Stage) -> None:
        step = self.progress.step
        if first_does(lambda: self.metrics is not None and step in self.metrics.validated, self.session.groups.world):
            return
        with self.pulse.during("validating"):
            result = score(self.trainer, self.held_out[stage.length])
        if self.metrics is not None:
            asked = self._critical_batch(stage, result.loss)
            self.metrics.write(place_figures(self.progress, stage) | validation_figures(result) | asked, advance=False)

    def _critical_batch(self, stage: Stage, loss: float) -> dict[str, float]:
        """What the plan's rule says of the batch at this validation loss; a note where the batch is less than half of it."""
        rule = self.plan.critical_batch
        if rule is None or not loss > 0:
            return {}
        asked, size = rule.tokens(loss), stage.batch_at(max(self.progress.stage_step - 1, 0))
        if self.metrics is not None and asked >= 2 * size:
            self.metrics.say(
                f"step {self.progress.step}: at validation loss {loss:.3f} the critical batch is {asked:,.0f} tokens, twice the {size:,} "
                f"of a step or more: `--override stages.{self.plan.stages.index(stage)}.batch_ramp=...` lets a larger one begin"
            )
        return {"critical_batch_tokens": asked}

    def _write_step(self, stage: Stage, report: StepReport, size: int, seconds: float, more: dict[str, Any]) -> None:
        if self.metrics is not None:
            flops = training_flops(self.plan.model, tokens=size, squares=report.squares)
            figures = step_figures(report, list(self.data.sources)) | speed_figures(size, seconds, flops, self.peak.flops) | more
            self.metrics.write(place_figures(self.progress, stage) | figures)
        if report.refusal is not None and self.metrics is not None:
            self.metrics.say(f"step {self.progress.step} was not applied: {'; '.join([report.refusal, *report.blamed])}")
