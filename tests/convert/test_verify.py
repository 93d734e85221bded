"""`convert verify`: what is sound passes, and each kind of difference is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimax_train.cli import main
from minimax_train.convert.config import write_config
from minimax_train.convert.from_hf import from_hf
from minimax_train.convert.to_hf import to_hf
from tests.support import FIXTURE, little_model

Says = Callable[..., tuple[int, str]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Says:
    """Runs the verb; (exit status, everything said)."""

    def run(*words: Any) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["convert", "verify", *map(str, words), "--workers", "1"])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    from_hf(FIXTURE, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "hf", "minimax_m1")
    return tmp_path / "ckpt", tmp_path / "hf"


def change(folder: Path, name: str, by: float) -> None:
    """One number of one tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] += by
    save_file(tensors, folder / "model.safetensors")


def test_an_export_is_its_checkpoint(both: tuple[Path, Path], verify: Says) -> None:
    checkpoint, export = both
    status, said = verify(export, "--against", checkpoint, "--layers")
    assert status == 0
    assert "minimax_m1 format, 155 tensors in 1 files, 1,338,304 bytes of F32" in said
    assert f"all 155 tensors are those of {checkpoint} to the bit" in said
    assert said.count("after layer") == 8 and said.count("equal\n") == 10
    assert "logits of 64 tokens of both are equal to the bit" in said


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("model.embed_tokens.weight", "the embedding"),
        ("model.layers.3.self_attn.qkv_proj.weight", "layer 3"),
        ("model.layers.7.self_attn.k_proj.weight", "layer 7"),
        ("model.layers.5.block_sparse_moe.gate.weight", "layer 5"),
        ("lm_head.weight", "the head"),
    ],
)
def test_the_first_layer_that_differs_is_named(both: tuple[Path, Path], verify: Says, name: str, first: str) -> None:
    checkpoint, export = both
    change(export, name, 0.5)
    ids = load_file(FIXTURE / "expected.safetensors")["input_ids"]
    ids[0, 0] = 0  # row 0 of the embedding, whose eighth number is changed, is used
    save_file({"input_ids": ids}, export.parent / "ids.safetensors")
    status, said = verify(export, "--against", checkpoint, "--input-ids", export.parent / "ids.safetensors")
    assert status == 1
    assert f"154 tensors are equal, these differ: 1: {name}" in said
    assert f"the first to differ: {first}\n" in said


def test_every_piece_is_compared(both: tuple[Path, Path], verify: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    """At pieces of a few rows: a number in the first one, and one whose sign alone differs, 0.0 and -0.0."""
    checkpoint, export = both
    monkeypatch.setattr("minimax_train.convert.pieces.MOST_BYTES", 1000)
    change(export, "model.layers.0.self_attn.qkv_proj.weight", 0.5)
    assert "these differ: 1: model.layers.0.self_attn.qkv_proj.weight" in verify(export, "--against", checkpoint)[1]
    for folder, zero in ((export, 0.0), (export.parent / "other", -0.0)):
        folder.mkdir(exist_ok=True)
        shutil.copy(FIXTURE / "config.json", folder)
        tensors = load_file(FIXTURE / "model.safetensors")
        tensors["model.norm.weight"][5] = zero
        save_file(tensors, folder / "model.safetensors")
    from_hf(export, export.parent / "zero")
    assert verify(export, "--against", export.parent / "zero")[0] == 0
    status, said = verify(export.parent / "other", "--against", export.parent / "zero")
    assert status == 1 and "these differ: 1: model.norm.weight" in said


def test_a_checkpoint_narrower_than_the_folder(tmp_path: Path, verify: Says) -> None:
    """from-hf --cast bf16 of fp32 weights: equal after the same cast of the folder's."""
    from_hf(FIXTURE, tmp_path / "narrow", cast="bf16")
    status, said = verify(FIXTURE, "--against", tmp_path / "narrow")
    assert status == 0, said


def test_another_base_alone_changes_the_logits(both: tuple[Path, Path], verify: Says) -> None:
    checkpoint, export = both
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    status, said = verify(export, "--against", checkpoint)
    assert status == 1
    assert "rope_base: 10000 -> 500000" in said and "the first to differ: layer 7\n" in said


def test_a_cast_is_told_and_is_no_difference(tmp_path: Path, both: tuple[Path, Path], verify: Says) -> None:
    checkpoint, _ = both
    to_hf(checkpoint, tmp_path / "bf16", "minimax_m1", cast="bf16")
    status, said = verify(tmp_path / "bf16", "--against", checkpoint)
    assert status == 0
    assert "to the bit, torch.float32 cast to torch.bfloat16" in said and "equal to the bit" in said


def test_another_model_is_told(tmp_path: Path, both: tuple[Path, Path], verify: Says) -> None:
    checkpoint, export = both
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"layernorm_mlp_alpha": 3.0, "rope_theta": 5e5}))
    status, said = verify(export, "--against", checkpoint)
    assert status == 1
    assert "alpha_experts: 2.0 -> 3.0" in said and "rope_base: 10000 -> 500000" in said


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_not_a_number_is_found_without_a_checkpoint(both: tuple[Path, Path], verify: Says, name: str) -> None:
    _, export = both
    assert verify(export)[0] == 0
    change(export, name, float("nan"))
    status, said = verify(export)
    assert status == 2
    assert f"NaN or infinity in 1: {name}" in said


def test_a_damaged_checkpoint_is_no_measure(both: tuple[Path, Path], verify: Says) -> None:
    checkpoint, export = both
    path = next((checkpoint / "tensors").glob("*.distcp"))
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    status, said = verify(export, "--against", checkpoint)
    assert status == 2
    assert f"{path.name} was changed: its checksum does not hold" in said


def test_against_transformers(tmp_path: Path, verify: Says) -> None:
    """The export of transformers' own model is run by transformers and by ours: they agree, and the layer where they would not is named."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    torch.manual_seed(0)
    raw = write_config(little_model(), 3e4, "minimax", "float32", 512)
    model = MiniMaxForCausalLM(MiniMaxConfig(**{k: v for k, v in raw.items() if k != "model_type"})).float()
    model.save_pretrained(tmp_path / "theirs")
    status, said = verify(tmp_path / "theirs", "--transformers", "--layers")
    assert status == 0, said
    assert "logits of 64 tokens by transformers and by this model agree to" in said and "after layer 2" in said
    shutil.copytree(tmp_path / "theirs", tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text())
    tensors = load_file(tmp_path / "wrong" / "model.safetensors")
    tensors["model.layers.1.self_attn.slope_rate"] *= 1.5  # transformers believes the decays it finds; this model works them out
    for name in ("query_decay", "key_decay", "diagonal_decay"):
        tensors[f"model.layers.1.self_attn.{name}"] **= 1.5
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    assert config["num_hidden_layers"] == 4
    status, said = verify(tmp_path / "wrong", "--transformers")
    assert status == 1
    assert "the first to differ: layer 1\n" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tokens", "0"], "--tokens is 0"),
        (["--layers"], "give --against CKPT or --transformers"),
        (["--transformers"], "export --format minimax"),
        (["--against", "/nowhere"], "not a checkpoint"),
        (["--input-ids", "/nowhere", "--transformers"], "nowhere is not a safetensors file"),
    ],
)
def test_wrong_words(both: tuple[Path, Path], verify: Says, words: list[str], says: str) -> None:
    status, said = verify(both[1], *words)
    assert status == 2
    assert says in said
