"""The command line as a user meets it: every verb's help, and one clear line with exit status 2 for bad input."""

import contextlib
import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimax_train.cli import main
from minimax_train.recipe import as_yaml, load_plan
from tests.support import FIXTURE, little_plan


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minimax_train.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)  # type: ignore[call-overload, no-any-return]


def does(*arguments: object) -> tuple[str, str]:
    """What a verb that succeeds prints and says. In this process, as `refused`."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main([str(argument) for argument in arguments])
    assert status == 0, error.getvalue()
    return out.getvalue(), error.getvalue()


def refused(*arguments: object, says: tuple[str, ...]) -> None:
    """Exit status 2, and one line that says all of `says`. In this process: starting one costs four seconds each time."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        status = main([str(argument) for argument in arguments])
    lines = [line for line in error.getvalue().splitlines() if line.startswith("minimax-train: error: ")]
    assert status == 2, error.getvalue()
    assert len(lines) == 1, error.getvalue()
    for words in says:
        assert words in lines[0], lines[0]


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "little.yaml"
    path.write_text(as_yaml(little_plan(corpus)))
    return path


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "show",
        "count",
        "plan",
        "train",
        "data prepare",
        "data inspect",
        "data verify",
        "data adopt",
        "convert from-hf",
        "convert to-hf",
        "logits",
    ]
    + ["evaluate positions", "evaluate needle", "generate", "checkpoint list", "checkpoint verify", "status", "report", "doctor"],
)
def test_help(verb: str) -> None:
    done = run(*verb.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: minimax-train")


def test_show_prints_a_recipe(tmp_path: Path) -> None:
    shown = run("show", "recipes.tiny:stdlib", "--set", "seed=5").stdout
    (tmp_path / "plan.yaml").write_text(shown)
    assert load_plan(str(tmp_path / "plan.yaml")) == load_plan("recipes.tiny:stdlib", ["seed=5"])
    assert run("show", tmp_path / "plan.yaml").stdout == shown


def test_count_json() -> None:
    counts = json.loads(run("count", "recipes.text01:shape", "--json").stdout)
    assert counts["parameters"] == 456_089_655_296
    assert counts["flops_per_token"]["8192"]["forward"] == pytest.approx(96.0e9, rel=1e-3)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("sead=3", ("'sead'", "did you mean 'seed'")),
        ("stages.0.lenght=3", ("stages.0.lenght", "did you mean 'length'")),
        ("optimizer.beta3=1", ("did you mean 'beta", "optimizer.beta3")),
        ("stages.9.length=3", ("2 entries", "'9'")),
        ("seed='3'", ("seed", "'3'", "integer")),
        ("stages.0.length=1e5", ("100000.0", "integer")),
        ("stages.0.batch_tokens=100", ("100", "multiple of length 64")),
        ("model.num_layers=6", ("6", "pattern of 4")),
        ("model.num_key_value_heads=3", ("multiple", "3")),
        ("model.rotary_dim=20", ("20", "head_dim 16")),
        ("model.experts_per_token=9", ("9", "num_experts 4")),
        ("stages.0.learning_rate.peak=-1", ("peak is -1",)),
        ("stages.0.learning_rate.peak=.nan", ("nan", "finite")),
        ("stages.0.learning_rate.warmup_steps=100", ("do not fit",)),
        ("precision=fp8", ("fp8", "'fp32' or 'bf16'")),
        ("layout.context=3", ("length is", "not a multiple of 6", "layout.context")),
        ("stages=[]", ("stages is empty",)),
        ("noequals", ("--set", "a.b=value")),
    ],
)
def test_bad_plan_keys_and_values(recipe: Path, setting: str, says: tuple[str, ...]) -> None:
    refused("show", recipe, "--set", setting, says=says)


def test_bad_recipes(tmp_path: Path) -> None:
    refused("show", "recipes.tiny:nothing", says=("recipes.tiny:nothing", "stdlib"))
    refused("show", tmp_path / "none.yaml", says=("none.yaml", "no such file"))
    (tmp_path / "bad.yaml").write_text("a: [1,\n")
    refused("show", tmp_path / "bad.yaml", says=("bad.yaml", "not YAML"))
    (tmp_path / "list.yaml").write_text("[1, 2]\n")
    refused("show", tmp_path / "list.yaml", says=("mapping",))


def test_wrong_world_sizes(recipe: Path, tmp_path: Path) -> None:
    """4 rows of 64 tokens do not divide over 3 ranks, 2 rows of 256 not over 4; nothing is started, nothing written."""
    refused("train", recipe, "--to", tmp_path / "run", "--ranks", 3, says=("4 rows", "3 data-parallel ranks"))
    refused("train", recipe, "--to", tmp_path / "run", "--ranks", 4, says=("2 rows", "4 data-parallel ranks"))
    refused("train", recipe, "--to", tmp_path / "run", "--ranks", 0, says=("--ranks is 0",))
    assert not (tmp_path / "run").exists()


def test_missing_data(recipe: Path, tmp_path: Path) -> None:
    arguments = ("train", recipe, "--to", tmp_path / "run", "--set", "data.train=/nowhere/x")
    refused(*arguments, says=("/nowhere/x",))
    done = run(*arguments, "--ranks", 2)  # ranks agree on the error, and one of them tells it
    assert done.returncode == 2
    assert done.stderr.count("/nowhere/x") == 1
    assert not (tmp_path / "run").exists()


def test_damaged_data(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json", ".tokenizer.json"):
        (tmp_path / f"cut{suffix}").write_bytes((corpus / f"train{suffix}").read_bytes())
    (tmp_path / "cut.bin").write_bytes((corpus / "train.bin").read_bytes()[:-8])
    refused("train", recipe, "--to", tmp_path / "run", "--set", f"data.train={tmp_path / 'cut'}", says=("cut.bin", "bytes"))
    assert not (tmp_path / "run").exists()


def test_tokens_beyond_the_vocabulary(recipe: Path, tmp_path: Path) -> None:
    refused("train", recipe, "--to", tmp_path / "run", "--set", "model.vocab_size=290", says=("290", "vocabulary"))
    assert not (tmp_path / "run").exists()


def test_no_cuda_here(recipe: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device: there is nothing to refuse")
    refused("train", recipe, "--to", tmp_path / "run", "--set", "device=cuda", says=("device is cuda", "device=cpu"))


def test_a_folder_that_is_no_run(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    refused("train", recipe, "--to", tmp_path, says=("exists and is not a run",))
    assert [p.name for p in tmp_path.iterdir() if p.name != "lock"] == ["mine"]
    refused("train", recipe, "--to", tmp_path / "mine", says=("is a file",))
    refused("train", recipe, "--to", tmp_path / "mine" / "below", says=("mine/below",))
    refused("status", tmp_path, says=("is not a run",))
    refused("report", tmp_path, says=("is not a run",))
    refused("checkpoint", "list", tmp_path, says=("neither a run",))


def test_start_from_converted_weights(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    """Train, export, import, begin from it: fresh works, carry is refused, another architecture and a lower RoPE base too."""
    first = tmp_path / "first"
    does("train", recipe, "--to", first, "--set", "steps=2")
    does("convert", "to-hf", first, "--to", tmp_path / "hf", "--format", "minimax", "--tokenizer", corpus / "train.tokenizer.json")
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    does("convert", "from-hf", tmp_path / "hf", "--to", tmp_path / "ckpt")
    start = f"start.checkpoint={tmp_path / 'ckpt'}"
    other = tmp_path / "other"
    refused("train", recipe, "--to", other, "--set", start, "--set", "start.optimizer=carry", says=("weights only", "fresh"))
    different = ("--set", "model.alpha_experts=3.0", "--set", "model.norm_eps=1e-6")
    refused("train", recipe, "--to", other, "--set", start, *different, says=("architecture", "alpha_experts", "norm_eps: 1e-05 -> 1e-06"))
    refused("train", recipe, "--to", other, "--set", start, "--set", "stages.0.rope_base=500", says=("RoPE base 10000", "500"))
    refused("train", recipe, "--to", other, "--set", f"start.checkpoint={tmp_path / 'nothing'}", says=("nothing", "no such folder"))
    assert not other.exists()
    _, said = does("train", recipe, "--to", other, "--set", start, "--set", "steps=1")
    assert "beginning from" in said
    does("convert", "to-hf", other, "--to", tmp_path / "hf again")  # the tokenizer travels by itself
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in (tmp_path / "hf", tmp_path / "hf again")]
    assert tokenizers[0] == tokenizers[1]
    validation = [json.loads(line) for folder in (first, other) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [line["validation_loss"] for line in validation if "validation_loss" in line]
    assert ends[1] == ends[2], "the first score of the new run is the last of the old: the same weights"
    does("train", recipe, "--to", tmp_path / "carried", "--set", f"start.checkpoint={first}", "--set", "start.optimizer=carry")


def test_full_disk(recipe: Path, tmp_path: Path) -> None:
    """No room for a checkpoint: exit 1, one line, the committed ones intact, nothing half-written, and it goes on when there is room."""
    folder = tmp_path / "run"
    does("train", recipe, "--to", folder, "--set", "steps=2")

    def no_large_files() -> None:  # writing beyond 64 KiB of one file fails as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))

    full = run("train", recipe, "--to", folder, "--set", "steps=4", preexec_fn=no_large_files)
    lines = [line for line in full.stderr.splitlines() if line.startswith("minimax-train: error: ")]
    assert full.returncode == 1, full.stderr
    assert len(lines) == 1
    assert "step-00000004 was not written" in lines[0]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000002"]
    does("checkpoint", "verify", folder)
    does("train", recipe, "--to", folder, "--set", "steps=4")


def test_logits_of_the_fixture(tmp_path: Path) -> None:
    """The released format and the original code's logits: within 2e-6 (a plain forward reaches 4e-7)."""
    does("convert", "from-hf", FIXTURE, "--to", tmp_path / "ckpt")
    expected = load_file(FIXTURE / "expected.safetensors")
    does("logits", tmp_path / "ckpt", "--input-ids", FIXTURE / "expected.safetensors", "--to", tmp_path / "out.safetensors")
    ours, theirs = load_file(tmp_path / "out.safetensors")["logits"], expected["logits"]
    assert ours.shape == theirs.shape
    assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-6
    ids = {"none.safetensors": {"x": torch.zeros(1)}, "large.safetensors": {"input_ids": torch.tensor([[1, 320]])}}
    for name, tensors in ids.items():
        save_file(tensors, tmp_path / name)
    common = ("logits", tmp_path / "ckpt", "--to", tmp_path / "o.safetensors", "--input-ids")
    refused(*common, tmp_path / "none.safetensors", says=("input_ids",))
    refused(*common, tmp_path / "large.safetensors", says=("320", "0 to 319"))
    refused(*common, FIXTURE / "config.json", says=("not a safetensors file",))
    assert not (tmp_path / "o.safetensors").exists()


def test_data_verbs(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs.jsonl").write_text('{"text": "one two three"}\n{"text": "four <|endoftext|> five"}\n')
    tokenizer = corpus / "train.tokenizer.json"
    done = run("data", "prepare", tmp_path / "docs.jsonl", "--tokenizer", tokenizer, "--to", tmp_path / "out" / "d")
    assert done.returncode == 0, done.stderr
    assert "2 documents" in run("data", "inspect", tmp_path / "out" / "d", "--png", tmp_path / "lengths.png").stdout + done.stdout
    assert (tmp_path / "lengths.png").stat().st_size > 5_000
    assert run("data", "verify", tmp_path / "out" / "d", "--tokenizer", tokenizer).returncode == 0
    binary, index = (tmp_path / "out" / f"d{suffix}" for suffix in (".bin", ".idx"))
    for path in (binary, index):
        (tmp_path / "theirs").with_suffix(path.suffix).write_bytes(path.read_bytes())
    assert main(["data", "adopt", str(tmp_path / "theirs"), "--tokenizer", str(tokenizer)]) == 0
    assert main(["data", "verify", str(tmp_path / "theirs")]) == 0
    flipped = bytearray((tmp_path / "out" / "d.bin").read_bytes())
    flipped[3] ^= 4
    (tmp_path / "out" / "d.bin").write_bytes(flipped)
    refused("data", "verify", tmp_path / "out" / "d", says=("d.bin",))
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"nope": 1}\n')
    common = ("data", "prepare", tmp_path / "bad.jsonl", "--tokenizer", tokenizer, "--to", tmp_path / "out" / "b")
    refused(*common, says=("bad.jsonl:2: no key 'text'",))
    refused(
        "data", "prepare", tmp_path / "docs.jsonl", "--tokenizer", tmp_path / "no.json", "--to", tmp_path / "out" / "b", says=("no.json",)
    )
    refused("data", "prepare", f"{tmp_path}/*.parquet", "--tokenizer", tokenizer, "--to", tmp_path / "out" / "b", says=("matches nothing",))
    refused(*common, "--workers", 0, says=("workers 0",))
    refused(*common, "--key", "body", says=("no key 'body'",))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(("b.", "."))]
    assert main([*map(str, common), "--skip-bad"]) == 0
    assert "1 bad documents left out, the first: " in capsys.readouterr().out


def test_data_verbs_and_help_do_without_torch() -> None:
    """It takes seconds to import."""
    code = "import sys; from minimax_train.cli import parse; parse(['status', 'x']); import data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
