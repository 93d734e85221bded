"""One document read on from where it stopped: by the model's own layers, with what they must remember as an argument and a result.

A lightning layer remembers S `[H, D, D]`, which never grows: S_t = exp(-s) S_{t-1} + k_t^T v_t, o_t = q_t S_t (kernels/lightning.py). A
softmax layer remembers the keys (turned) and values of all tokens so far. Many tokens take the parallel form, one token the recurrence.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_train.kernels import lightning_attention
from minimax_train.model.block import Block
from minimax_train.model.decoder import Decoder
from minimax_train.model.lightning import LightningAttention
from minimax_train.model.rope import rotate, rotation
from minimax_train.model.softmax import SoftmaxAttention

Kept = tuple[Tensor, ...]
"""Of a lightning layer (S,): `[H, D, D]`, state[d_k, d_v], fp32 whatever the weights' dtype (fp64 for fp64). Of a softmax layer (keys,
values): `[tokens, G, D]` each, in the weights' dtype."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the first `tokens` tokens of a document left in each layer. It is never changed: reading on makes another."""

    tokens: int
    layers: tuple[Kept, ...]


def blank(decoder: Decoder) -> Memory:
    """Before a document's first token. ValueError where this is not the whole model on one rank."""
    config, weight = decoder.config, next(decoder.parameters())
    if not (decoder.is_first and decoder.is_last):
        raise ValueError(f"the decoder has layers {decoder.layers.start} to {decoder.layers.stop - 1} alone; reading on needs all of them")
    block = next(iter(decoder.blocks.values()))
    assert isinstance(block, Block)
    ranks = block.experts.groups.size
    if ranks > 1:
        raise ValueError(f"the model is shared by {ranks} ranks; reading on needs one rank: leave the layout out")
    heads, size = config.num_attention_heads, config.head_dim
    state = weight.new_zeros(heads, size, size, dtype=torch.promote_types(weight.dtype, torch.float32))
    none = weight.new_zeros(0, config.num_key_value_heads, size)
    return Memory(tokens=0, layers=tuple((state,) if kind == "lightning" else (none, none) for kind in config.layer_kinds))


@torch.no_grad()
def read_on(decoder: Decoder, tokens_T: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """The document's next tokens, int64 `[T]` with T >= 1 -> what the layers make of them `[T, hidden]`, and the memory after them.

    decoder.head(decoder.norm(x)) of it are the logits of a document read at once, to rounding, however it is read in parts.
    """
    positions = torch.arange(memory.tokens, memory.tokens + len(tokens_T), device=tokens_T.device)
    turn = rotation(positions, decoder.config.rotary_dim, decoder.rope_base)
    x, layers = decoder.embedding(tokens_T), []
    for block, kept in zip(decoder.blocks.values(), memory.layers, strict=True):
        assert isinstance(block, Block)
        h, mixer = block.attention_norm(x), block.attention
        mixed, kept = _lightning(mixer, h, kept) if isinstance(mixer, LightningAttention) else _softmax(mixer, h, turn, kept)
        x, _ = block.after_mixer(h, mixed)
        layers.append(kept)
    return x, Memory(tokens=memory.tokens + len(tokens_T), layers=tuple(layers))


def _lightning(layer: LightningAttention, x_TC: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
    qkv = F.silu(layer.qkv_proj(x_TC)).unflatten(1, (-1, 3, layer.head_dim))
    q, k, v = (part[None] for part in qkv.unbind(2))
    backend = "definition" if len(x_TC) == 1 else layer.backend  # one token is the recurrence itself
    o, state = lightning_attention(q, k, v, layer.slopes, initial_state=kept[0][None], backend=backend)
    return layer.out_proj(layer.norm(o[0].flatten(1), layer.output_gate(x_TC))), (state[0],)


def _softmax(layer: SoftmaxAttention, x_TC: Tensor, turn: tuple[Tensor, Tensor], kept: Kept) -> tuple[Tensor, Kept]:
    q, k, v = (project(x_TC).unflatten(1, (-1, layer.head_dim)) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rotate(q, *turn), rotate(k, *turn)
    keys, values = torch.cat((kept[0], k)), torch.cat((kept[1], v))
    new, before = len(q), len(kept[0])
    mask = None
    if new > 1 and before:  # a query sees what was before, and of the new ones those up to itself
        mask = torch.ones(new, before + new, dtype=torch.bool, device=q.device).tril(before)
    q, heads_k, heads_v = (part.transpose(0, 1)[None] for part in (q, keys, values))
    o = F.scaled_dot_product_attention(q, heads_k, heads_v, attn_mask=mask, is_causal=not before, enable_gqa=True)
    return layer.o_proj(o[0].transpose(0, 1).flatten(1)), (keys, values)
