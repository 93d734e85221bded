"""config.json <-> ModelConfig, key by key; what one side cannot express is refused, never dropped.

`minimax_m1` is the released format (with `minimax_text_01` its older name); `minimax` is transformers' own, which ignores
`rotary_dim` and knows slopes for power-of-two head counts only.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from minimax_train.model.config import LayerKind, ModelConfig, shortest_pattern

Format = Literal["minimax_m1", "minimax_text_01", "minimax"]
FORMATS: tuple[Format, ...] = ("minimax_m1", "minimax_text_01", "minimax")

_NAMES: dict[str, Format] = {  # model_type, and the class attribute of the released configuration code
    "minimax_m1": "minimax_m1",
    "MiniMaxM1": "minimax_m1",
    "minimax_text_01": "minimax_text_01",
    "MiniMaxText01": "minimax_text_01",
    "minimax": "minimax",
}
_SAME = {  # our name -> the name in every format
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}
_RELEASED = {
    "alpha_lightning": "layernorm_linear_attention_alpha",
    "beta_lightning": "layernorm_linear_attention_beta",
    "alpha_softmax": "layernorm_full_attention_alpha",
    "beta_softmax": "layernorm_full_attention_beta",
    "alpha_experts": "layernorm_mlp_alpha",
    "beta_experts": "layernorm_mlp_beta",
}
_NATIVE = {
    "alpha_lightning": "linear_attn_alpha_factor",
    "beta_lightning": "linear_attn_beta_factor",
    "alpha_softmax": "full_attn_alpha_factor",
    "beta_softmax": "full_attn_beta_factor",
    "alpha_experts": "mlp_alpha_factor",
    "beta_experts": "mlp_beta_factor",
}
_FACTORS = {*_RELEASED, "norm_eps"}
_REQUIRED_VALUES = {  # keys with one value this model can have; absent means that value
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "postnorm": True,
    "shared_intermediate_size": 0,
}
_WITHOUT_MEANING = {  # keys that say nothing of the architecture
    "architectures",
    "auto_map",
    "model_type",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "max_position_embeddings",
    "output_router_logits",
    "router_aux_loss_coef",
    "shared_moe_mode",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "block_size",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "_name_or_path",
}


@dataclass(frozen=True, kw_only=True)
class Described:
    """A config.json, understood."""

    model: ModelConfig
    rope_base: float
    max_positions: int
    format: Format


def read_config(raw: dict[str, Any], source: str) -> Described:
    """ValueError, naming the key, on anything this model cannot be or does not know."""
    name = raw.get("model_type")
    kind = _NAMES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{source}: model_type is {name!r}; this converter reads {', '.join(FORMATS)}")
    special = {**_SAME, **(_NATIVE if kind == "minimax" else _RELEASED)}
    own = (
        {"layer_types", "rope_parameters", "rope_theta", "rotary_dim"}
        if kind == "minimax"
        else {"attn_type_list", "rope_theta", "rotary_dim"}
    )
    unknown = sorted(set(raw) - set(special.values()) - own - _REQUIRED_VALUES.keys() - _WITHOUT_MEANING)
    if unknown:
        raise ValueError(f"{source}: unknown key {', '.join(unknown)}: refused, since it might change the model")
    for key, wanted in _REQUIRED_VALUES.items():
        if raw.get(key, wanted) != wanted or isinstance(raw.get(key, wanted), bool) != isinstance(wanted, bool):
            raise ValueError(f"{source}: {key} is {raw[key]!r}; this model can only express {wanted!r}")
    missing = [key for key in special.values() if key not in raw]
    if kind != "minimax" and "postnorm" not in raw:
        missing.append("postnorm")  # where it is absent the released code builds another model, with its norms before the sublayers
    if missing:
        raise ValueError(f"{source}: {', '.join(missing)} missing")
    values = {ours: raw[theirs] for ours, theirs in special.items()}
    kinds = _layer_kinds(raw, kind, source)
    rotary = raw.get("rotary_dim", raw["head_dim"])
    if len(kinds) != values["num_layers"]:
        raise ValueError(f"{source}: {len(kinds)} layer kinds for num_hidden_layers {values['num_layers']}")
    model = _model({**values, "pattern": shortest_pattern(kinds), "rotary_dim": rotary}, special, source)
    if kind == "minimax":
        check_native(model, source)
    positions = raw.get("max_position_embeddings", 10_240_000)  # the release's value: a cap, not a training length
    if type(positions) is not int or positions < 1:
        raise ValueError(f"{source}: max_position_embeddings is {positions!r}; a number of tokens is needed")
    return Described(model=model, rope_base=_rope_base(raw, kind, source), max_positions=positions, format=kind)


def _model(values: dict[str, Any], names: dict[str, str], source: str) -> ModelConfig:
    """The record, strictly: 8 is not "8", and no number is NaN."""
    try:
        model = TypeAdapter(ModelConfig).validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        ours = str(first["loc"][0]) if first["loc"] else ""
        raise ValueError(f"{source}: {names.get(ours, ours) or 'the model'}: {first['msg']}") from None
    for ours in sorted(_FACTORS):
        value = getattr(model, ours)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{source}: {names[ours]} is {value}; a number above 0 is needed")
    return model


def _layer_kinds(raw: dict[str, Any], kind: Format, source: str) -> tuple[LayerKind, ...]:
    key = "layer_types" if kind == "minimax" else "attn_type_list"
    names: dict[Any, LayerKind] = {"linear_attention": "lightning", "full_attention": "softmax", 0: "lightning", 1: "softmax"}
    entries = raw.get(key)
    wanted = str if kind == "minimax" else int
    if not isinstance(entries, list) or not entries or any(type(entry) is not wanted or entry not in names for entry in entries):
        raise ValueError(f"{source}: {key} is {str(entries)[:100]}; a list of layer kinds is needed")
    return tuple(names[entry] for entry in entries)


def _rope_base(raw: dict[str, Any], kind: Format, source: str) -> float:
    rope = raw.get("rope_parameters") or {"rope_type": "default", "rope_theta": raw.get("rope_theta")}
    if not isinstance(rope, dict):
        raise ValueError(f"{source}: rope_parameters is {str(rope)[:100]}; an object is needed")
    if rope.get("rope_type", "default") != "default" or set(rope) - {"rope_type", "rope_theta", "partial_rotary_factor"}:
        raise ValueError(f"{source}: rope_parameters is {rope!r}; only the default type with rope_theta is known")
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor is {factor}; transformers ignores it: state rotary_dim in minimax_m1 format")
    base = rope.get("rope_theta")
    if not isinstance(base, (int, float)) or isinstance(base, bool) or not 0 < base < 1e30:
        raise ValueError(f"{source}: rope_theta is {base!r}; a number above 0 is needed")
    return float(base)


def check_native(model: ModelConfig, source: str) -> None:
    """ValueError where transformers' `minimax` would run the model wrong without a word."""
    if model.rotary_dim != model.head_dim:
        raise ValueError(
            f"{source}: rotary_dim {model.rotary_dim} differs from head_dim {model.head_dim}: transformers' minimax rotates all channels "
            "and would run this model wrong; use --format minimax_m1"
        )
    heads = model.num_attention_heads
    if heads & (heads - 1):
        raise ValueError(
            f"{source}: {heads} attention heads is no power of two: transformers' minimax has other decay slopes and would run this model "
            "wrong; use --format minimax_m1"
        )
    if model.lightning_norm_eps != 1e-6:
        raise ValueError(f"{source}: lightning_norm_eps is {model.lightning_norm_eps}; Hugging Face formats fix it at 1e-6")


_DERIVED = {"architectures", "auto_map", "model_type", "torch_dtype", "dtype", "max_position_embeddings", "_name_or_path"}
_CARRIED = _WITHOUT_MEANING - _DERIVED
_ARCHITECTURES: dict[Format, str] = {
    "minimax": "MiniMaxForCausalLM",
    "minimax_m1": "MiniMaxM1ForCausalLM",
    "minimax_text_01": "MiniMaxText01ForCausalLM",
}


def write_config(
    model: ModelConfig, rope_base: float, kind: Format, dtype: str, max_positions: int, origin: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of `model` in one of the formats. What says nothing of the architecture is taken from `origin`, the config.json that
    the weights came with: token ids, and in its own format the auto_map."""
    if kind == "minimax":
        check_native(model, "to-hf")
    elif model.lightning_norm_eps != 1e-6:
        raise ValueError(f"to-hf: lightning_norm_eps is {model.lightning_norm_eps}; Hugging Face formats fix it at 1e-6")
    config: dict[str, Any] = {"architectures": [_ARCHITECTURES[kind]], "model_type": kind, "torch_dtype": dtype}
    names = {**_SAME, **(_NATIVE if kind == "minimax" else _RELEASED)}
    config |= {theirs: getattr(model, ours) for ours, theirs in names.items()}
    config |= {"hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0, "router_jitter_noise": 0.0}
    config |= {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": max_positions, "sliding_window": None}
    config |= {"rotary_dim": model.rotary_dim, "router_aux_loss_coef": 0.001, "output_router_logits": False, "use_cache": True}
    if kind == "minimax":
        config["layer_types"] = ["full_attention" if k == "softmax" else "linear_attention" for k in model.layer_kinds]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": rope_base}
    else:
        config["attn_type_list"] = [int(k == "softmax") for k in model.layer_kinds]
        config |= {"rope_theta": rope_base, "postnorm": True, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid"}
    if origin is not None:
        config |= {key: origin[key] for key in sorted(_CARRIED & origin.keys())}
        if same_format(origin, kind) and "auto_map" in origin:
            config["auto_map"] = origin["auto_map"]
    return config


def same_format(origin: dict[str, Any], kind: Format) -> bool:
    """Whether a config.json is of a format, so that code made for it reads the other."""
    return _NAMES.get(str(origin.get("model_type"))) == kind
