"""The model as megatron-core's schedules want it, and what one forward step returns."""

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from minimax_train.engine.parts import MegatronParts, transformer_config
from minimax_train.engine.session import Session
from minimax_train.kernels.choice import best_backends
from minimax_train.model.config import ModelConfig
from minimax_train.model.decoder import Decoder
from minimax_train.model.initialise import initialise
from minimax_train.model.router import Routing
from minimax_train.model.router_options import RouterOptions
from minimax_train.model.row import Row
from minimax_train.plan import Precision


class PipelineStage(MegatronModule):
    """A Decoder with the attributes the schedules, DDP and the optimizer ask of a pipeline stage."""

    def __init__(self, config: TransformerConfig, decoder: Decoder) -> None:
        super().__init__(config)
        self.network = decoder  # megatron-core expects layers of its own in an attribute called `decoder`
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, x: Tensor | list[Tensor] | None) -> None:
        """What the previous stage sent; a model in one stage gets nothing."""

    def forward(self, row: Row) -> tuple[Tensor, list[Routing]]:
        result: tuple[Tensor, list[Routing]] = self.network(row)
        return result


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
    """The model on this rank, its weights drawn from `seed` (None: left unset, to be loaded)."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    megatron = transformer_config(config, session.groups, torch_dtype, session.device)
    backends = best_backends(session.device, torch_dtype, config.head_dim)
    router = router or RouterOptions()
    parts = MegatronParts(config=megatron, groups=session.groups, device=session.device, backends=backends, router=router)
    decoder = Decoder(config, parts, fp32_head=fp32_head, rope_base=rope_base)
    if seed is not None:
        initialise(decoder, config, seed, parts)
    return PipelineStage(megatron, decoder)


def bare(model: nn.Module) -> Decoder:
    """The Decoder inside DDP and the stage."""
    while not isinstance(model, Decoder):
        model = model.network if isinstance(model, PipelineStage) else model.module  # type: ignore[assignment]
    return model
