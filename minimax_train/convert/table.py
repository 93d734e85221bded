"""One table of names for both directions: each of our parameters, and the tensors it is on the Hugging Face side.

Names on disk are the same in all formats. Linears are `[out, in]`; lightning qkv is head-major on both sides; our stacked experts
are the released per-expert w1 (gate), w3 (up) and w2 (down), in transformers' memory gate_up_proj and down_proj, stacked as ours. Decay
buffers of transformers' exports are recomputed, never read. A sibling family is another function that returns entries.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from minimax_train.model.config import ModelConfig

DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
Stacking = Literal["disk", "memory"]
"""Experts as files have them, a tensor for each matrix, or stacked, as transformers 5 holds them in memory."""
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor of theirs: the box of our parameter from `offset`, as many numbers long on each axis as `box` says."""

    name: str
    shape: Shape
    offset: Shape
    box: Shape


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter of ours."""

    name: str
    parts: tuple[Part, ...]
    shape: Shape
    fp32: bool = False
    """Kept in fp32 whatever the model's dtype, as released."""
    cut: int | None = None
    """The axis that tensor-parallel ranks (of the experts: expert-tensor-parallel ones) share out; None: all have the whole."""
    matrices: int = 1
    """So many matrices are stacked along that axis, and each rank has its part of each."""


def table(config: ModelConfig, stacking: Stacking = "disk") -> list[Entry]:
    """Every parameter of the model, in order."""
    hidden, width, keys = config.hidden_size, config.attention_size, config.key_value_size
    entries = [_one("embedding.weight", "model.embed_tokens.weight", config.vocab_size, hidden, cut=0)]
    for layer, kind in enumerate(config.layer_kinds):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        entries += [
            _one(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", hidden),
            _one(f"{ours}.experts_norm.weight", f"{theirs}.post_attention_layernorm.weight", hidden),
        ]
        mixer: dict[str, tuple[Shape, int]] = (  # name -> shape, cut
            {
                "qkv_proj": ((3 * width, hidden), 0),
                "output_gate": ((width, hidden), 0),
                "out_proj": ((hidden, width), 1),
                "norm": ((width,), 0),
            }
            if kind == "lightning"
            else {
                "q_proj": ((width, hidden), 0),
                "k_proj": ((keys, hidden), 0),
                "v_proj": ((keys, hidden), 0),
                "o_proj": ((hidden, width), 1),
            }
        )
        entries += [
            _one(f"{ours}.attention.{name}.weight", f"{theirs}.self_attn.{name}.weight", *shape, cut=cut)
            for name, (shape, cut) in mixer.items()
        ]
        entries += _experts(config, f"{ours}.experts", theirs, stacking)
    return [
        *entries,
        _one("norm.weight", "model.norm.weight", hidden),
        _one("head.weight", "lm_head.weight", config.vocab_size, hidden, cut=0),
    ]


def _experts(config: ModelConfig, ours: str, layer: str, stacking: Stacking) -> list[Entry]:
    hidden, ffn, count = config.hidden_size, config.expert_ffn_size, config.num_experts
    both, down = (count, 2 * ffn, hidden), (count, hidden, ffn)
    if stacking == "memory":
        return [
            _one(f"{ours}.router.weight", f"{layer}.mlp.gate.weight", count, hidden, fp32=True),
            _one(f"{ours}.gate_up", f"{layer}.mlp.experts.gate_up_proj", *both, cut=1, matrices=2),
            _one(f"{ours}.down", f"{layer}.mlp.experts.down_proj", *down, cut=2),
        ]
    theirs = f"{layer}.block_sparse_moe"

    def expert(e: int, w: str, first: int, *shape: int) -> Part:
        return Part(name=f"{theirs}.experts.{e}.{w}.weight", shape=shape, offset=(e, first, 0), box=(1, *shape))

    gate_up = [expert(e, w, first, ffn, hidden) for e in range(count) for w, first in (("w1", 0), ("w3", ffn))]
    downs = [expert(e, "w2", 0, hidden, ffn) for e in range(count)]
    return [
        _one(f"{ours}.router.weight", f"{theirs}.gate.weight", count, hidden, fp32=True),
        Entry(name=f"{ours}.gate_up", parts=tuple(gate_up), shape=both, cut=1, matrices=2),
        Entry(name=f"{ours}.down", parts=tuple(downs), shape=down, cut=2),
    ]


def _one(ours: str, theirs: str, *shape: int, fp32: bool = False, cut: int | None = None, matrices: int = 1) -> Entry:
    part = Part(name=theirs, shape=shape, offset=(0,) * len(shape), box=shape)
    return Entry(name=ours, parts=(part,), shape=shape, fp32=fp32, cut=cut, matrices=matrices)


def tensor_count(config: ModelConfig) -> int:
    """How many tensors the released format has, without listing them."""
    return 3 + config.num_layers * (7 + 3 * config.num_experts)


def is_decay_buffer(name: str) -> bool:
    """Whether it is one of the four tensors that transformers adds to a lightning layer."""
    head, _, last = name.rpartition(".")
    return last in DECAY_BUFFERS and head.startswith("model.layers.") and head.endswith(".self_attn")


def by_part(entries: Iterable[Entry]) -> dict[str, tuple[Entry, Part]]:
    """Their name -> the parameter and the part of it."""
    return {part.name: (entry, part) for entry in entries for part in entry.parts}
