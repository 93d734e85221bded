"""One training step on megatron-core: DDP, distributed optimizer, schedule."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import nn

from minimax_train.engine.batch import Totals, run_batch, total
from minimax_train.engine.gradient_kinds import norms_by_kind
from minimax_train.engine.local_gradients import LocalGradients
from minimax_train.engine.replicas import Idle, check_replicas
from minimax_train.engine.session import Session
from minimax_train.engine.stage import PipelineStage, bare, build_stages, together
from minimax_train.engine.update import gradient_norm, update
from minimax_train.model.decoder import Decoder
from minimax_train.model.row import Row
from minimax_train.plan import Plan


@dataclass(frozen=True, kw_only=True)
class StepReport(Totals):
    """What one optimizer step did, over all ranks."""

    grad_norm: float
    """Before clipping."""
    grad_norms: dict[str, float]
    """The same by kind of weight, see gradient_kinds.py."""
    rank_norms: list[float]
    """Of every rank's own gradient, before ranks were summed."""
    refusal: str | None = None
    """Why the gradient was not applied; None where it was."""
    blamed: list[str]
    """Of a gradient that was not applied: which ranks' own was no number, or stood out."""


class Trainer:
    """Layers, gradients and optimizer of one rank; a step trains on the rank's rows of a global batch.

    All ranks of a pipeline get the same rows: each needs their documents and positions, the last one their labels.
    """

    def __init__(self, plan: Plan, session: Session, *, bucket_size: int | None = None) -> None:
        """`bucket_size`: numbers in a bucket of gradients that are reduced together (None: megatron-core's 40M). Pipeline ranks after
        the first, whose reduction nobody waits for, have one bucket."""
        self.plan, self.session = plan, session
        held = plan.cut(session.groups.layout).held(session.groups.pipeline.rank())
        stages = build_stages(
            plan.model,
            session,
            held,
            dtype=plan.precision,
            seed=plan.seed,
            fp32_head=plan.fp32_head,
            router=plan.router,
            experts_backend=plan.experts_backend,
        )
        self.chunks = [_data_parallel(stage, bucket_size) for stage in stages]
        self.decoder: nn.Module = together(self.decoders)
        """This rank's part of the model: parameters under their global names."""
        config = stages[0].config  # all chunks share it
        config.finalize_model_grads_func = finalize_model_grads
        no_sync, grad_sync, param_sync = zip(*((c.no_sync, c.start_grad_sync, c.start_param_sync) for c in self.chunks), strict=True)
        if len(self.chunks) > 1:  # the interleaved schedule starts each chunk's communication on all pipeline ranks at once
            config.no_sync_func, config.grad_sync_func, config.param_sync_func = list(no_sync), list(grad_sync), list(param_sync)
        else:
            (config.no_sync_func,), (config.grad_sync_func,) = no_sync, grad_sync
        self.optimizer = get_megatron_optimizer(_optimizer_config(plan), self.chunks)
        config.grad_scale_func = self.optimizer.scale_loss
        self.local, self.idle = LocalGradients(self.chunks, self.decoder), Idle()

    @property
    def decoders(self) -> list[Decoder]:
        """This rank's chunks of the layers."""
        return [bare(chunk) for chunk in self.chunks]

    def step(
        self,
        rows: list[Row],
        learning_rate: float,
        judge: Callable[[float, float], str | None] = lambda *_: None,
        *,
        check: bool = False,
    ) -> StepReport:
        """One optimizer step on this rank's `rows` (the same number on every rank), unless `judge` gives a reason why a gradient should
        not be applied, of the batch's loss and the gradient's norm: then no weight and no moment changes. `check`: looks for silent
        corruption, of weights now and of the optimizer's state between this step and the next; Corruption where it is found."""
        self.zero_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.plan.optimizer.weight_decay * group["wd_mult"]  # norms are not decayed
        totals = self.descend(rows)
        norm = gradient_norm(self.optimizer)
        groups = self.session.groups
        kinds, of_ranks = norms_by_kind(self.decoder, self.optimizer, self.plan.model, groups, self.local.square())
        if check:
            check_replicas(self.decoder, groups)
        self.idle.check(self.decoder, self.optimizer, groups)
        refusal = judge(totals.loss, norm)
        blamed = [] if refusal is None else self.local.blame(of_ranks, groups)
        if refusal is None:
            update(self.optimizer, norm, self.plan.optimizer.clip_grad)
        if check:
            self.idle.keep(self.decoder, self.optimizer)
        return StepReport(**vars(totals), grad_norm=norm, grad_norms=kinds, rank_norms=of_ranks, refusal=refusal, blamed=blamed)

    def zero_gradients(self) -> None:
        """Before each batch."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def descend(self, rows: list[Row]) -> Totals:
        """Gradients of a batch, as the optimizer takes them: per predicted token, summed over all ranks."""
        unit = self.session.groups.data if self.plan.router.unit == "data" else None
        reports = run_batch(self.chunks, rows, coefficient=self.plan.auxiliary_loss, unit=unit, forward_only=False)
        return total(reports, self.plan.model, self.session.groups, self.session.device, len(self.plan.data.by_name))

    @torch.no_grad()
    def score(self, rows: list[Row], counted: int) -> Totals:
        """What the first `counted` held-out rows say, of any lengths. Every rank goes through the same number of rows, for ranks exchange
        tokens with each other's experts."""
        self.settle()
        for chunk in self.chunks:
            chunk.eval()
        reports = run_batch(self.chunks, rows, coefficient=0.0, forward_only=True, counted=counted)
        return total(reports, self.plan.model, self.session.groups, self.session.device)

    def settle(self) -> None:
        """Finishes the gather of updated weights: call before weights are read outside `step` (a save)."""
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)


def _data_parallel(stage: PipelineStage, bucket_size: int | None) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        align_param_gather=stage.vp_stage is not None,  # the interleaved schedule starts gathers itself
        bucket_size=bucket_size,
    )
    return DistributedDataParallel(stage.config, settings, stage)


def _optimizer_config(plan: Plan) -> OptimizerConfig:
    settings = plan.optimizer
    bf16 = plan.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=max(stage.learning_rate.peak for stage in plan.stages),  # set anew every step
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )
