"""One table of names for both directions: each of our parameters and the tensors it is on the Hugging Face side.

Names on disk are the same in all formats. Linears are `[out, in]`; lightning qkv is head-major on both sides; our stacked experts
are the released per-expert w1 (gate), w3 (up) and w2 (down). Decay buffers of transformers' exports are recomputed, never read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minimax_train.model.config import ModelConfig

Read = Callable[[str], Tensor]

DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter of ours."""

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    """Their tensors, (name, shape), in the order `join` stacks them."""
    shape: tuple[int, ...]
    fp32: bool = False
    """Kept in fp32 whatever the model's dtype, as released."""

    def join(self, read: Read) -> Tensor:
        """Our tensor from theirs."""
        tensors = [read(name) for name, _ in self.parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors).view(self.shape)

    def split(self, ours: Tensor) -> dict[str, Tensor]:
        """Their tensors from ours."""
        if len(self.parts) == 1:
            return {self.parts[0][0]: ours}
        rows = ours.reshape(-1, ours.shape[-1]).split([shape[0] for _, shape in self.parts])
        return {name: part.clone() for (name, _), part in zip(self.parts, rows, strict=True)}


def table(config: ModelConfig) -> list[Entry]:
    """Every parameter of the model, in order."""
    hidden, width = config.hidden_size, config.attention_size
    entries = [_one("embedding.weight", "model.embed_tokens.weight", config.vocab_size, hidden)]
    for layer, kind in enumerate(config.layer_kinds):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        entries += [
            _one(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", hidden),
            _one(f"{ours}.experts_norm.weight", f"{theirs}.post_attention_layernorm.weight", hidden),
        ]
        shapes = (
            {"qkv_proj": (3 * width, hidden), "output_gate": (width, hidden), "out_proj": (hidden, width), "norm": (width,)}
            if kind == "lightning"
            else {
                "q_proj": (width, hidden),
                "k_proj": (config.key_value_size, hidden),
                "v_proj": (config.key_value_size, hidden),
                "o_proj": (hidden, width),
            }
        )
        entries += [_one(f"{ours}.attention.{name}.weight", f"{theirs}.self_attn.{name}.weight", *shape) for name, shape in shapes.items()]
        entries += _experts(config, f"{ours}.experts", f"{theirs}.block_sparse_moe")
    entries += [_one("norm.weight", "model.norm.weight", hidden), _one("head.weight", "lm_head.weight", config.vocab_size, hidden)]
    return entries


def _experts(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    hidden, ffn, count = config.hidden_size, config.expert_ffn_size, config.num_experts
    gate_up = tuple((f"{theirs}.experts.{e}.{w}.weight", (ffn, hidden)) for e in range(count) for w in ("w1", "w3"))
    down = tuple((f"{theirs}.experts.{e}.w2.weight", (hidden, ffn)) for e in range(count))
    return [
        _one(f"{ours}.router.weight", f"{theirs}.gate.weight", count, hidden, fp32=True),
        Entry(name=f"{ours}.gate_up", parts=gate_up, shape=(count, 2 * ffn, hidden)),
        Entry(name=f"{ours}.down", parts=down, shape=(count, hidden, ffn)),
    ]


def _one(ours: str, theirs: str, *shape: int, fp32: bool = False) -> Entry:
    return Entry(name=ours, parts=((theirs, shape),), shape=shape, fp32=fp32)
