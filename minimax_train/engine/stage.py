"""The model as megatron-core's schedules want it: a chunk of its layers, what it is sent, and what it sends on."""

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from minimax_train.engine.parts import MegatronParts, transformer_config
from minimax_train.engine.session import Session
from minimax_train.engine.tally import Tally
from minimax_train.kernels.choice import best_backends
from minimax_train.kernels.grouped_linear import Asked
from minimax_train.model.config import ModelConfig
from minimax_train.model.decoder import Decoder
from minimax_train.model.initialise import initialise
from minimax_train.model.router import Routing
from minimax_train.model.router_options import RouterOptions
from minimax_train.model.row import Row
from minimax_train.plan import Precision


class _AlsoDescend(torch.autograd.Function):
    """x `[T, hidden]` -> itself, `[T, 1, hidden]`; and `loss` gets the gradient 1 when x gets its own.

    So a loss that arises here joins the sum that training descends, and need not travel to the last stage. (That sum is not scaled: fp32
    and bf16 need no loss scaling.) What is returned shares x's memory but is no view of it: the schedule frees it once it was sent.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.dtype, loss.device
        return x[:, None].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss
        return grads[0][:, 0], torch.ones((), dtype=dtype, device=device)


class PipelineStage(MegatronModule):
    """A Decoder with the attributes the schedules, DDP and the optimizer ask of a chunk of a pipeline rank's layers."""

    def __init__(self, config: TransformerConfig, decoder: Decoder, *, chunk: int, tensor_rank: int) -> None:
        """`chunk`: which of this rank's; `tensor_rank`: the rank in its tensor-parallel group."""
        super().__init__(config)
        self.network = decoder  # megatron-core expects layers of its own in an attribute called `decoder`
        self.tensor_rank = tensor_rank
        self.pre_process, self.post_process = decoder.is_first, decoder.is_last
        self.vp_stage = chunk if config.virtual_pipeline_model_parallel_size is not None else None
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self.received: Tensor | None = None

    def set_input_tensor(self, x: list[Tensor | None]) -> None:
        """What the previous stage sent, `[T, 1, hidden]`; the first one gets nothing."""
        (self.received,) = x

    def forward(self, row: Row, auxiliary_weight: float | Tensor, tally: Tally) -> tuple[Tensor, list[Routing]]:
        """On the last stage losses `[T]`, on others what the next one gets, `[T, 1, hidden]`; and the routing of these layers.

        Each layer's auxiliary loss, `auxiliary_weight` times, joins what training descends. The first stage shows `tally` what it
        embeds.
        """
        decoder, received, self.received = self.network, self.received, None
        x = received[:, 0] if received is not None else tally.embedded(decoder.embedding(row.tokens), self.tensor_rank)
        x, routings = decoder.hidden(x, row)
        auxiliary: Tensor = auxiliary_weight * torch.stack([r.auxiliary_loss for r in routings]).sum()
        sent: Tensor = _AlsoDescend.apply(x, auxiliary)
        if not decoder.is_last:
            return sent, routings
        assert row.labels is not None, "the row has no labels"
        return decoder.losses(sent[:, 0], row.labels), routings


def build_stage(
    config: ModelConfig,
    session: Session,
    *,
    dtype: Precision = "fp32",
    seed: int | None = 0,
    fp32_head: bool = False,
    rope_base: float = 10_000.0,
    router: RouterOptions | None = None,
) -> PipelineStage:
    """The whole model on this rank, its weights drawn from `seed` (None: left unset, to be loaded)."""
    layers = range(config.num_layers)
    return build_stages(config, session, (layers,), dtype=dtype, seed=seed, fp32_head=fp32_head, rope_base=rope_base, router=router)[0]


def build_stages(
    config: ModelConfig,
    session: Session,
    chunks: tuple[range, ...],
    *,
    dtype: Precision = "fp32",
    seed: int | None = 0,
    fp32_head: bool = False,
    rope_base: float = 10_000.0,
    router: RouterOptions | None = None,
    experts_backend: Asked = "auto",
) -> list[PipelineStage]:
    """The layers that this rank holds, chunk by chunk; a weight is the same whichever rank draws it. ValueError where a form of the experts
    is asked for that cannot run."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    megatron = transformer_config(config, session.groups, torch_dtype, session.device)
    expert_sizes = (config.hidden_size, config.expert_ffn_size // session.groups.layout.expert_tensor)
    backends = best_backends(session.device, torch_dtype, config.head_dim, expert_sizes, experts_backend)
    router = router or RouterOptions()
    parts = MegatronParts(config=megatron, groups=session.groups, device=session.device, backends=backends, router=router)
    stages = []
    for chunk, layers in enumerate(chunks):
        decoder = Decoder(config, parts, layers=layers, fp32_head=fp32_head, rope_base=rope_base)
        if seed is not None:
            initialise(decoder, config, seed)
        stages.append(PipelineStage(megatron, decoder, chunk=chunk, tensor_rank=session.groups.tensor.rank()))
    return stages


def bare(model: nn.Module) -> Decoder:
    """The Decoder inside DDP and the stage."""
    while not isinstance(model, Decoder):
        model = model.network if isinstance(model, PipelineStage) else model.module  # type: ignore[assignment]
    return model


def together(decoders: list[Decoder]) -> nn.Module:
    """All chunks as one module, for its parameters under their global names; it cannot be called."""
    held = nn.Module()
    held.blocks = nn.ModuleDict({layer: block for decoder in decoders for layer, block in decoder.blocks.items()})
    for decoder in decoders:
        for name, part in decoder.named_children():
            if name != "blocks":
                held.add_module(name, part)
    return held
