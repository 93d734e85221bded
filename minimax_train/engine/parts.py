"""The model's parameters, made by megatron-core's tensor-parallel layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region, gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor, nn

from minimax_train.kernels.choice import Backends
from minimax_train.kernels.cross_entropy import Part, linear_cross_entropy
from minimax_train.model.config import ModelConfig
from minimax_train.model.parts import Cut
from minimax_train.model.router_options import RouterOptions
from parallel.collectives import Channel, all_sum
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
        if self.sequence_parallel:  # each rank's gradient of the gathered x comes from its rows of the head: their sum goes back
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.tp_group)
        if labels is not None:
            channel = Channel(self.tp_group)
            part = Part(rank=channel.rank, ranks=channel.size, gather=lambda t: channel.begin_all_gather(t, "losses").finish())
            return linear_cross_entropy(x, self.weight, labels, fp32=self.fp32, part=part)
        w = self.weight.float() if self.fp32 else self.weight
        logits: Tensor = gather_from_tensor_model_parallel_region(x.to(w.dtype) @ w.T, group=self.tp_group)
        return logits


class Embedding(VocabParallelEmbedding):
    """VocabParallelEmbedding of a packed row: int64 `[S]` -> this rank's tokens of it `[T, size]`."""

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.reduce_scatter_embeddings:
            output: Tensor = super().forward(tokens)
            return output
        scattered: Tensor = super().forward(tokens[None])  # it wants [batch, tokens] and gives [tokens / ranks, batch, size]
        return scattered[:, 0]


class Row(RowParallelLinear):
    """RowParallelLinear without bias, returning the tensor alone."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x)[0]
        return output


def transformer_config(config: ModelConfig, groups: Groups, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    """megatron-core's record of the same facts: what its linears, DDP, schedules and optimizer read."""
    layout = groups.layout
    interleaved = layout.virtual_pipeline > 1
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
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        deallocate_pipeline_outputs=not interleaved,  # the interleaved schedule would free them while they are still being sent
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,  # in a batch, two ranks that send each other two tensors at once mix them up
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
    router: RouterOptions = field(default_factory=RouterOptions)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.config.params_dtype
        return dtype

    @property
    def ranks(self) -> int:
        return self.groups.tensor.size()

    @property
    def total(self) -> Callable[[Tensor], Tensor] | None:
        return partial(all_sum, group=self.groups.tensor) if self.ranks > 1 else None

    def mine(self, size: int) -> range:
        rank, part = self.groups.tensor.rank(), divide(size, self.ranks)
        return range(rank * part, (rank + 1) * part)

    def replicated(self, *shape: int, dtype: torch.dtype) -> nn.Parameter:
        weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=self.device))
        weight.sequence_parallel = True  # type: ignore[attr-defined]  # its gradient is summed over the group, for each rank saw other tokens
        return weight

    def sharded(self, size: int, *, dtype: torch.dtype) -> nn.Parameter:
        weight = nn.Parameter(torch.empty(len(self.mine(size)), dtype=dtype, device=self.device))
        self._mark(weight, 0)
        return weight

    def experts(self, *shape: int, axis: int, matrices: int = 1, dtype: torch.dtype) -> nn.Parameter:
        """Reduced over groups.expert_data: ranks with the same part of them, the tensor-parallel ranks of other blocks among them.

        `tensor_model_parallel` at every layout, for the gradient norm takes what is not from tensor rank 0 alone. Every number of an expert
        is in one rank's range of the optimizer: of the ranks that hold it, expert_data, each has another range.
        """
        expert, slices = self.groups.expert, self.groups.expert_tensor
        first = Cut(axis=0, rank=expert.rank, ranks=expert.size)
        second = Cut(axis=axis, rank=slices.rank, ranks=slices.size, matrices=matrices)
        local = list(shape)
        for cut in (first, second):
            local[cut.axis] = divide(local[cut.axis], cut.ranks)
        weight = nn.Parameter(torch.empty(local, dtype=dtype, device=self.device))
        weight.allreduce, weight.tensor_model_parallel = False, True  # type: ignore[attr-defined]
        weight.cuts = (first, second)  # type: ignore[attr-defined]
        return weight

    def _mark(self, weight: nn.Parameter, axis: int) -> None:
        """Says, to megatron-core and to us, that the weight is cut over the tensor-parallel group."""
        set_tensor_model_parallel_attributes(weight, True, axis, 1)
        weight.cuts = (Cut(axis=axis, rank=self.groups.tensor.rank(), ranks=self.ranks),)  # type: ignore[attr-defined]

    def _common(self) -> dict[str, Any]:
        return {"config": self.config, "init_method": self.config.init_method, "tp_group": self.groups.tensor}

    def column(self, inputs: int, outputs: int) -> nn.Module:
        linear = Column(inputs, outputs, bias=False, gather_output=False, **self._common())
        self._mark(linear.weight, 0)
        return linear

    def row(self, inputs: int, outputs: int) -> nn.Module:
        linear = Row(inputs, outputs, bias=False, input_is_parallel=True, skip_bias_add=False, **self._common())
        self._mark(linear.weight, 1)
        return linear

    def head(self, inputs: int, outputs: int, *, fp32: bool) -> nn.Module:
        head = Head(inputs, outputs, bias=False, gather_output=False, **self._common())
        head.fp32 = fp32
        self._mark(head.weight, 0)
        return head

    def embedding(self, rows: int, size: int) -> nn.Module:
        embedding = Embedding(rows, size, reduce_scatter_embeddings=self.config.sequence_parallel, **self._common())
        self._mark(embedding.weight, 0)
        return embedding
