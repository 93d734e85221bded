"""Hugging Face both ways: bit-exact, every tensor accounted for, nothing dropped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimax_train.convert.config import read_config, write_config
from minimax_train.convert.from_hf import from_hf
from minimax_train.convert.table import table
from minimax_train.convert.to_hf import to_hf
from minimax_train.engine.session import Session
from minimax_train.evaluate.logits import batch_logits, load_decoder
from minimax_train.model.config import text01
from tests.support import FIXTURE, little_model


def test_round_trip_is_bit_exact(alone: Session, tmp_path: Path) -> None:
    from_hf(FIXTURE, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "hf", "minimax_m1")
    ours, theirs = load_file(tmp_path / "hf" / "model.safetensors"), load_file(FIXTURE / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    written, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", FIXTURE))
    for key in original.keys() - {"auto_map", "initializer_range", "transformers_version"}:
        assert written[key] == original[key], key


def test_bf16_round_trip_keeps_routers_in_fp32(alone: Session, tmp_path: Path) -> None:
    """As released: routers fp32, all else bf16."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(FIXTURE / "config.json", source)
    tensors = {
        n: t if n.endswith("block_sparse_moe.gate.weight") else t.bfloat16() for n, t in load_file(FIXTURE / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors")
    assert from_hf(source, tmp_path / "ckpt").precision == "bf16"
    to_hf(tmp_path / "ckpt", tmp_path / "hf", "minimax_text_01")
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in tensors.items())


def test_transformers_own_export_comes_back(alone: Session, tmp_path: Path) -> None:
    """save_pretrained writes decay buffers and other keys: the buffers are left out, the function is the same."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    raw = write_config(little_model(), 3e4, "minimax", "float32", 512)
    model = MiniMaxForCausalLM(MiniMaxConfig(**{k: v for k, v in raw.items() if k != "model_type"}, attn_implementation="eager")).float()
    model.save_pretrained(tmp_path / "theirs")
    record = from_hf(tmp_path / "theirs", tmp_path / "ckpt")
    assert (record.model, record.rope_base) == (little_model(), 3e4)
    decoder, _ = load_decoder(tmp_path / "ckpt", alone)
    ids = torch.randint(0, 300, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(ids, use_cache=False, attention_mask=torch.ones_like(ids)).logits
    assert ((batch_logits(decoder, ids) - theirs).norm() / theirs.norm()).item() < 2e-6


def test_table_has_the_releases_tensors() -> None:
    """8,243 tensors, 912,210,767,872 bytes with bf16 weights and fp32 routers: the released index, to the byte."""
    entries = table(text01())
    parts = [(part.name, part.shape, entry.fp32) for entry in entries for part in entry.parts]
    assert len(parts) == len({name for name, _, _ in parts}) == 8243
    numbers = [(torch.Size(shape).numel(), fp32) for _, shape, fp32 in parts]
    assert sum(n * (4 if fp32 else 2) for n, fp32 in numbers) == 912_210_767_872


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"postnorm": False}, "postnorm"),
        ({"shared_intermediate_size": 64}, "shared_intermediate_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"surprise": 1}, "unknown key surprise"),
        ({"attn_type_list": [0, 1]}, "2 layer kinds for num_hidden_layers 8"),
        ({"attn_type_list": [0, 2]}, "attn_type_list"),
        ({"rope_theta": None}, "rope_theta"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"layernorm_mlp_alpha": ...}, "layernorm_mlp_alpha missing"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], says: str) -> None:
    raw = json.loads((FIXTURE / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=says):
        read_config({k: v for k, v in raw.items() if v is not ...}, "config.json")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("missing", "lacks 1: model.norm.weight"),
        ("extra", "has unknown 1: stray"),
        ("shape", r"lm_head.weight has \[48, 320\], not \[320, 48\]"),
        ("nan", "NaN"),
        ("mixed", "ask for --cast fp32 or --cast bf16"),
        ("cut", "bytes; its header describes"),
        ("pickle", "never are"),
        ("outside", "outside the folder"),
        ("index", "disagree about 1: stray"),
    ],
)
def test_weights_that_are_refused(alone: Session, tmp_path: Path, damage: str, says: str) -> None:
    """Every refusal names the tensor or file, and no checkpoint appears."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(FIXTURE / "config.json", source)
    tensors = load_file(FIXTURE / "model.safetensors")
    match damage:
        case "missing":
            del tensors["model.norm.weight"]
        case "extra":
            tensors["stray"] = torch.zeros(1)
        case "shape":
            tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()
        case "nan":
            tensors["model.norm.weight"][3] = float("nan")
        case "mixed":
            tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    save_file(tensors, source / "model.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors")
    match damage:
        case "cut":
            (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
        case "pickle":
            (source / "model.safetensors").rename(source / "pytorch_model.bin")
        case "outside":
            shutil.copy(FIXTURE / "model.safetensors", tmp_path / "outside.safetensors")
            weight_map["lm_head.weight"] = "../outside.safetensors"
        case "index":
            weight_map["stray"] = "model.safetensors"
    if damage in ("outside", "index"):
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=says):
        from_hf(source, tmp_path / "ckpt")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "ckpt"))) == []


def test_what_transformers_would_run_wrong_is_refused(alone: Session, tmp_path: Path) -> None:
    from_hf(FIXTURE, tmp_path / "ckpt")
    with pytest.raises(ValueError, match="rotary_dim 8 differs from head_dim 16"):
        to_hf(tmp_path / "ckpt", tmp_path / "hf", "minimax")
    with pytest.raises(ValueError, match="no power of two"):
        write_config(little_model(num_attention_heads=6), 1e4, "minimax", "float32", 64)
    assert not (tmp_path / "hf").exists()
