"""The model's parameters, made by megatron-core's tensor-parallel layers."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from minimax_train.kernels.choice import Backends
from minimax_train.kernels.cross_entropy import linear_cross_entropy
from minimax_train.model.config import ModelConfig
from parallel.groups import Groups


class Column(ColumnParallelLinear):
    """ColumnParallelLinear without bias, returning the tensor alone."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x)[0]
        return output


class Head(Column):
    """The LM head: logits, or with labels each token's cross-entropy without ever making all logits.

    Both are the module's call, not a use of its weight from outside: DDP waits for a weight's gather when its module is called.
    """

    fp32 = False

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            return linear_cross_entropy(x, self.weight, labels, fp32=self.fp32)
        if self.fp32:
            return x.float() @ self.weight.float().T
        return super().forward(x)


class Row(RowParallelLinear):
    """RowParallelLinear without bias, returning the tensor alone."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x)[0]
        return output


def transformer_config(config: ModelConfig, groups: Groups, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    """megatron-core's record of the same facts: what its linears, DDP, schedules and optimizer read."""
    layout = groups.layout
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.expert_ffn_size,
        num_moe_experts=config.num_experts,
        moe_ffn_hidden_size=config.expert_ffn_size,
        moe_router_topk=config.experts_per_token,
        add_bias_linear=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # initialise.py draws every weight from its global name
        use_cpu_initialization=device.type == "cpu",
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # before DDP is built: it decides who divides by the token count
    )


@dataclass(frozen=True, kw_only=True)
class MegatronParts:
    """minimax_train.model.parts.Parts, by megatron-core."""

    config: TransformerConfig
    groups: Groups
    device: torch.device
    backends: Backends

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.config.params_dtype
        return dtype

    def _common(self) -> dict[str, Any]:
        return {"config": self.config, "init_method": self.config.init_method, "tp_group": self.groups.tensor}

    def column(self, inputs: int, outputs: int) -> nn.Module:
        linear = Column(inputs, outputs, bias=False, gather_output=False, **self._common())
        set_tensor_model_parallel_attributes(linear.weight, True, 0, 1)
        return linear

    def row(self, inputs: int, outputs: int) -> nn.Module:
        linear = Row(inputs, outputs, bias=False, input_is_parallel=True, skip_bias_add=False, **self._common())
        set_tensor_model_parallel_attributes(linear.weight, True, 1, 1)
        return linear

    def head(self, inputs: int, outputs: int, *, fp32: bool) -> nn.Module:
        head = Head(inputs, outputs, bias=False, gather_output=False, **self._common())
        head.fp32 = fp32
        set_tensor_model_parallel_attributes(head.weight, True, 0, 1)
        return head

    def embedding(self, rows: int, size: int) -> nn.Module:
        embedding = VocabParallelEmbedding(rows, size, reduce_scatter_embeddings=self.config.sequence_parallel, **self._common())
        set_tensor_model_parallel_attributes(embedding.weight, True, 0, 1)
        return embedding
