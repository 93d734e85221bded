"""One training step on megatron-core: DDP, distributed optimizer, schedule."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minimax_train.engine.routing_report import RoutingReport
from minimax_train.engine.session import Session
from minimax_train.engine.stage import PipelineStage, bare, build_stage
from minimax_train.model.decoder import Decoder
from minimax_train.model.router import Routing
from minimax_train.model.row import Row
from minimax_train.plan import Plan
from parallel.collectives import all_sum
from parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step did, over all ranks."""

    loss: float
    """Mean cross-entropy, nats per predicted token of the global batch."""
    predicted_tokens: int
    squares: int
    """Sum of the documents' squared lengths: what causal attention costs."""
    auxiliary_loss: float
    """Mean over rows and layers; 1 at balance."""
    imbalance: float
    """The busiest context rank's softmax attention over the mean rank's, mean over rows."""
    grad_norm: float
    """Before clipping."""
    routing: RoutingReport
    """Of every layer."""


class Trainer:
    """Model, gradients and optimizer of one rank; a step trains on the rank's rows of a global batch."""

    def __init__(self, plan: Plan, session: Session, *, bucket_size: int | None = None) -> None:
        """`bucket_size`: numbers in a bucket of gradients that are reduced together (None: megatron-core's 40M)."""
        self.plan, self.session = plan, session
        stage = build_stage(plan.model, session, dtype=plan.precision, seed=plan.seed, fp32_head=plan.fp32_head, router=plan.router)
        config = stage.config
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
                bucket_size=bucket_size,
            ),
            stage,
        )
        config.no_sync_func, config.finalize_model_grads_func = self.model.no_sync, finalize_model_grads
        config.grad_sync_func, config.param_sync_func = self.model.start_grad_sync, self.model.start_param_sync
        self.optimizer = get_megatron_optimizer(_optimizer_config(plan), [self.model])
        config.grad_scale_func = self.optimizer.scale_loss

    @property
    def decoder(self) -> Decoder:
        return bare(self.model)

    def step(self, rows: list[Row], learning_rate: float) -> StepReport:
        """One optimizer step on this rank's `rows` (the same number on every rank)."""
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.plan.optimizer.weight_decay * group["wd_mult"]  # norms are not decayed
        reports = self._schedule(rows, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        return self._summarise(reports, float(grad_norm))

    def settle(self) -> None:
        """Finishes the gather of updated weights: call before weights are read outside `step` (a save, an evaluation)."""
        self.model.start_param_sync(force_sync=True)

    def _schedule(self, rows: list[Row], *, forward_only: bool) -> list[dict[str, Tensor]]:
        schedule = get_forward_backward_func()
        reports: list[dict[str, Tensor]] = schedule(
            forward_step_func=partial(_forward_step, plan=self.plan, groups=self.session.groups),
            data_iterator=iter(rows),
            model=[self.model],
            num_microbatches=len(rows),
            seq_length=len(rows[0].tokens),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return reports

    def _summarise(self, reports: list[dict[str, Tensor]], grad_norm: float) -> StepReport:
        """Sums over rows and ranks: one small collective a step, in which every figure is counted once.

        Each rank of a row has a share of the auxiliary loss; tensor-parallel ranks have the same losses; and what is said of the whole
        row is the same on all of its ranks.
        """
        groups = self.session.groups
        ours, rows_ours = float(groups.tensor.rank() == 0), float(groups.tensor_context.rank() == 0)
        once = {"loss": ours, "predicted": ours, "auxiliary": 1.0, "squares": rows_ours, "rows": rows_ours, "imbalance": rows_ours}
        routing = torch.stack([r["routing"] for r in reports]).sum(0)  # of each rank's own tokens
        scalars = torch.stack([torch.stack([r[name].double() * weight for name, weight in once.items()]) for r in reports]).sum(0)
        total = all_sum(torch.cat([scalars, routing.flatten()]), groups.world).cpu()
        loss, predicted, auxiliary, squares, rows, imbalance = total[: len(once)].tolist()
        return StepReport(
            loss=loss / max(predicted, 1.0),
            predicted_tokens=int(predicted),
            squares=int(squares),
            auxiliary_loss=auxiliary / rows,
            imbalance=imbalance / rows,
            grad_norm=grad_norm,
            routing=RoutingReport.of(total[len(once) :].view(routing.shape), self.plan.model.experts_per_token),
        )


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


def _forward_step(rows: Iterator[Row], model: PipelineStage, *, plan: Plan, groups: Groups) -> tuple[Tensor, Any]:
    """One row forward. The loss is a sum over predicted tokens: megatron-core divides by their global number.

    The auxiliary loss is taken per unit of the router, a row or those that data-parallel ranks have in flight, and weighs as much as the
    unit's tokens; here is a share of it.
    """
    row = next(rows)
    assert row.labels is not None
    losses, routings = model(row)
    predicted = (row.labels >= 0).sum()  # on this rank
    auxiliary, rows_of_unit = _mean_auxiliary(routings), 1
    unit = losses.new_tensor(row.predicted)
    if plan.router.unit == "data" and groups.data.size() > 1:
        unit, rows_of_unit = all_sum(unit, groups.data), groups.data.size()
    total = losses.sum() + plan.auxiliary_loss * len(routings) * auxiliary * unit
    report = {
        "loss": losses.detach().sum(),
        "predicted": predicted,
        "squares": predicted.new_tensor(row.pieces.squares),
        "rows": predicted.new_ones(()),
        "imbalance": losses.new_tensor(row.pieces.imbalance()),
        "auxiliary": auxiliary.detach() * rows_of_unit,
        "routing": torch.stack([r.sums for r in routings]),
    }
    return total, lambda output: (output, predicted.to(torch.int), report)


def _mean_auxiliary(routings: list[Routing]) -> Tensor:
    return torch.stack([r.auxiliary_loss for r in routings]).mean()
