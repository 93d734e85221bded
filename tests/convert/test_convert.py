"""Hugging Face both ways: bit-exact, every tensor accounted for, nothing dropped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimax_train.checkpoint.record import Progress, Record
from minimax_train.checkpoint.store import save
from minimax_train.convert.config import read_config, write_config
from minimax_train.convert.from_hf import from_hf
from minimax_train.convert.table import table
from minimax_train.convert.to_hf import to_hf
from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.engine.state import model_state
from minimax_train.evaluate.logits import batch_logits, load_decoder
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


def test_fixture_logits(alone: Session, tmp_path: Path) -> None:
    """The released code's own logits, 700 tokens, partial rotary; through the checkpoint and, once more, through our export."""
    expected = load_file(FIXTURE / "expected.safetensors")
    from_hf(FIXTURE, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "hf", "minimax_text_01")
    from_hf(tmp_path / "hf", tmp_path / "again")
    for checkpoint in ("ckpt", "again"):
        decoder, _ = load_decoder(tmp_path / checkpoint, alone)
        logits = batch_logits(decoder, expected["input_ids"])
        assert ((logits - expected["logits"]).norm() / expected["logits"].norm()).item() < 2e-6


def made(tmp_path: Path, alone: Session, **changes: Any) -> Path:
    """A checkpoint of the little model, its weights drawn, its norms not all one."""
    config = little_model(**changes)
    model, g = bare(build_stage(config, alone, seed=5)), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=g)
    record = Record(model=config, rope_base=3e4, max_positions=512, precision="fp32", progress=Progress(), optimizer_steps=None)
    save(tmp_path / "ckpt", model_state(model, alone.groups), record, alone.groups)
    return tmp_path / "ckpt"


def test_transformers_generates_the_same_tokens(alone: Session, tmp_path: Path) -> None:
    """transformers loads the `minimax` export and its greedy tokens are ours."""
    from transformers import MiniMaxForCausalLM

    checkpoint = made(tmp_path, alone)
    to_hf(checkpoint, tmp_path / "hf", "minimax", shard_bytes=100_000)
    theirs = MiniMaxForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    generated = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    decoder, _ = load_decoder(checkpoint, alone)
    ours = ids
    for _ in range(12):
        ours = torch.cat([ours, batch_logits(decoder, ours)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, ours)
    assert len(set(ours[0, 40:].tolist())) > 3, "it says one token over and over: the test shows little"


def test_six_heads_are_the_released_slopes(alone: Session, tmp_path: Path) -> None:
    """transformers' maths with the released code's slopes put in, for a head count where transformers' own differ (and so are refused)."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    checkpoint = made(tmp_path, alone, num_attention_heads=6, num_key_value_heads=2)
    to_hf(checkpoint, tmp_path / "hf", "minimax_m1")
    raw = write_config(little_model(), 3e4, "minimax", "float32", 512) | {"num_attention_heads": 6}
    theirs = MiniMaxForCausalLM(MiniMaxConfig(**{k: v for k, v in raw.items() if k != "model_type"}, attn_implementation="eager")).float()
    state, tensors = theirs.state_dict(), load_file(tmp_path / "hf" / "model.safetensors")
    in_memory = {entry.name: entry.parts[0].name for entry in table(little_model(num_attention_heads=6), "memory")}
    for entry in table(little_model(num_attention_heads=6)):
        target = state[in_memory[entry.name]]
        for part in entry.parts:
            target[tuple(slice(a, a + n) for a, n in zip(part.offset, part.box, strict=True))] = tensors[part.name].view(part.box)
    closest = [2.0 ** (-2 * (i + 1)) for i in range(4)]  # ALiBi for 4 heads; the other two are every second one of those for 8
    rates = torch.tensor([*closest, 2.0**-1, 2.0**-3])
    ids = torch.randint(0, 300, (1, 90), generator=torch.Generator().manual_seed(0))
    decoder, _ = load_decoder(checkpoint, alone)
    errors = []
    for patched in (False, True):
        for index, layer in enumerate(theirs.model.layers):
            if patched and hasattr(layer.self_attn, "slope_rate"):
                layer.self_attn.slope_rate = (rates * (1 - index / 3 + 1e-5))[:, None, None]
                factors = layer.self_attn.decay_factors(layer.self_attn.slope_rate)
                layer.self_attn.query_decay, layer.self_attn.key_decay, layer.self_attn.diagonal_decay = factors
        with torch.no_grad():
            expected = theirs(ids, use_cache=False, attention_mask=torch.ones_like(ids)).logits
        errors.append(((batch_logits(decoder, ids) - expected).norm() / expected.norm()).item())
    assert errors[0] > 1e-3
    assert errors[1] < 2e-6


def test_a_cast_is_asked_for(tmp_path: Path) -> None:
    """bf16 routers, as transformers' own bf16 exports have them, and fp16 weights need a word; the cast is torch's rounding."""
    original = load_file(FIXTURE / "model.safetensors")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        (tmp_path / name).mkdir()
        shutil.copy(FIXTURE / "config.json", tmp_path / name)
        save_file({n: t.to(dtype) for n, t in original.items()}, tmp_path / name / "model.safetensors")
    with pytest.raises(ValueError, match="a router, is BF16; routers are kept in F32: ask for --cast bf16"):
        from_hf(tmp_path / "bf16", tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"weights are F16 .*: ask for --cast fp32 or --cast bf16"):
        from_hf(tmp_path / "fp16", tmp_path / "ckpt")
    for source, cast in (("bf16", "bf16"), ("fp16", "fp32"), ("fp16", "bf16"), ("bf16", "fp32")):
        from_hf(tmp_path / source, tmp_path / f"{source}-{cast}", cast=cast)  # type: ignore[arg-type]
        to_hf(tmp_path / f"{source}-{cast}", tmp_path / f"{source}-{cast}-hf", "minimax_m1")
        tensors = load_file(tmp_path / f"{source}-{cast}-hf" / "model.safetensors")
        for name, tensor in original.items():
            low = tensor.to(torch.bfloat16 if source == "bf16" else torch.float16)
            wanted = low.float() if name.endswith("moe.gate.weight") else low.to({"fp32": torch.float32, "bf16": torch.bfloat16}[cast])
            assert tensors[name].dtype == wanted.dtype and torch.equal(tensors[name], wanted), (source, cast, name)
    from_hf(FIXTURE, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "hf", "minimax_m1", cast="bf16")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(tensors[n], t if n.endswith("moe.gate.weight") else t.bfloat16()) for n, t in original.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_stacked_experts_of_transformers_memory(tmp_path: Path) -> None:
    """A state_dict of transformers 5 saved as it is, experts stacked, is the same checkpoint."""
    (tmp_path / "source").mkdir()
    shutil.copy(FIXTURE / "config.json", tmp_path / "source")
    tensors, stacked = load_file(FIXTURE / "model.safetensors"), {}
    config = read_config(json.loads((FIXTURE / "config.json").read_text()), "config.json").model
    for entry, held in zip(table(config), table(config, "memory"), strict=True):
        whole = torch.zeros(entry.shape)
        for part in entry.parts:
            whole[tuple(slice(a, a + n) for a, n in zip(part.offset, part.box, strict=True))] = tensors[part.name].view(part.box)
        stacked[held.parts[0].name] = whole
    assert len(stacked) < len(tensors) / 2
    save_file(stacked, tmp_path / "source" / "model.safetensors")
    for source, name in ((FIXTURE, "one"), (tmp_path / "source", "two")):
        from_hf(source, tmp_path / name)
        to_hf(tmp_path / name, tmp_path / f"{name}-hf", "minimax_m1")
    assert (tmp_path / "one-hf" / "model.safetensors").read_bytes() == (tmp_path / "two-hf" / "model.safetensors").read_bytes()


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
        ({"postnorm": ...}, "postnorm missing"),
        ({"layernorm_mlp_alpha": 10**400}, "layernorm_mlp_alpha"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0; a number above 0"),
        ({"num_local_experts": "4"}, "num_local_experts: Input should be a valid integer"),
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
