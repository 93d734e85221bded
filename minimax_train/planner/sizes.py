"""What a rank holds of a stage's rows and of the model: the sizes that every formula of this room is made of."""

from dataclasses import dataclass
from typing import Literal

from minimax_train.kernels.grouped_linear import ROWS
from minimax_train.model.config import ModelConfig
from minimax_train.model.recompute import Recompute
from minimax_train.plan import Plan
from parallel.expert_plan import choose_groups
from parallel.layout import Layout

Device = Literal["cpu", "cuda"]

IMBALANCE = 1.25
"""Rows that the busiest rank's experts get, over what they get at balance; a verdict counts with it. Ours: the balancing loss holds
experts near each other, but nothing is dropped."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes on one rank; letters as in docs/parallelism.md, "Does it fit?"."""

    device: Device
    recompute: Recompute
    bytes: int
    """b, of a number of the model's dtype."""
    tokens: int
    """T: of a row on this rank, between the mixers."""
    gathered: int
    """G = T tensor: those that the tensor-parallel ranks work on together, each with its heads."""
    hidden: int
    """C."""
    width: int
    """A: this rank's heads x head size."""
    key_value: int
    """K: this rank's key-value heads x head size, in softmax layers."""
    heads: int
    """H, this rank's."""
    head_size: int
    """D."""
    rotary: int
    choices: int
    """k: experts a token takes."""
    experts: int
    """E, of the whole layer."""
    local_experts: int
    ffn: int
    """f: this rank's slice of an expert's width."""
    received: int
    """R: rows that this rank's experts get for one row of the batch."""
    travels: bool
    """Whether rows leave the rank."""
    token_groups: int
    vocabulary: int
    """V, this rank's."""
    context: int
    tensor: int
    fp32_head: bool
    interleaved: bool

    @property
    def sent(self) -> int:
        """T k: (token, choice) rows of this rank's own tokens."""
        return self.tokens * self.choices

    @property
    def copies_input(self) -> bool:
        """Whether a layer's norm keeps its input in another dtype, and so another tensor."""
        return self.device == "cpu" and self.bytes == 2

    @property
    def state(self) -> int:
        """Bytes of one lightning state of all heads of this rank, fp32."""
        return self.heads * self.head_size**2 * 4

    @property
    def slots(self) -> int:
        """Pieces of a row on a rank."""
        return 2 if self.context > 1 else 1


def sizes_of(plan: Plan, number: int, *, device: Device, imbalance: float = 1.0) -> Sizes:
    """Of the plan's stage `number`, with `imbalance` (IMBALANCE; 1 at balance) on the busiest rank's experts."""
    stage, layout, model = plan.stages[number], plan.layout_of(number), plan.model
    tokens = stage.length // layout.context // layout.tensor
    block = layout.expert * layout.expert_tensor
    choices = tokens * model.experts_per_token
    return Sizes(
        device=device,
        recompute=stage.recompute,
        bytes=2 if plan.precision == "bf16" else 4,
        tokens=tokens,
        gathered=tokens * layout.tensor,
        hidden=model.hidden_size,
        width=model.attention_size // layout.tensor,
        key_value=model.key_value_size // layout.tensor,
        heads=model.num_attention_heads // layout.tensor,
        head_size=model.head_dim,
        rotary=model.rotary_dim,
        choices=model.experts_per_token,
        experts=model.num_experts,
        local_experts=model.num_experts // layout.expert,
        ffn=model.expert_ffn_size // layout.expert_tensor,
        received=_received(model, layout, choices, imbalance) + _filling(plan, layout, device),
        travels=block > 1,
        token_groups=(layout.token_groups or choose_groups(choices * block, model.num_experts, block)),
        vocabulary=model.vocab_size // layout.tensor,
        context=layout.context,
        tensor=layout.tensor,
        fp32_head=plan.fp32_head,
        interleaved=layout.virtual_pipeline > 1,
    )


def _received(model: ModelConfig, layout: Layout, choices: int, imbalance: float) -> int:
    """All of a block's rows at most; a rank that has all experts gets what it sends."""
    block = layout.expert * layout.expert_tensor
    evenly = choices * layout.expert_tensor
    return evenly if layout.expert == 1 else int(min(evenly * imbalance, choices * block))


def _filling(plan: Plan, layout: Layout, device: Device) -> int:
    """Rows of zeros that grouped products want behind an expert's, half of the most on average."""
    grouped = device == "cuda" and plan.precision == "bf16" and plan.experts_backend in ("auto", "grouped")
    return plan.model.num_experts // layout.expert * ROWS // 2 if grouped else 0
