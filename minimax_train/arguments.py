"""What the command line understands: verbs, their arguments, and what `--help` says. Imports nothing heavy, and reads no environment."""

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

SUBMITTED = {"data": ("prepare",), "convert": ("from-hf", "to-hf", "verify"), "evaluate": ("needle", "positions")}
"""Verbs that `submit` takes beside a recipe."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; `verb` names the function of cli.py that takes them. SystemExit(2), with argparse's words, where they are wrong."""
    return _submitted(list(words)) if _submits_a_verb(words) else _parser().parse_args(list(words))


def _submits_a_verb(words: Sequence[str]) -> bool:
    """`submit data ...`, where `submit RECIPE ...` would be a recipe of that name."""
    rest = [word for word in words[:3] if word != "--traceback"]
    return rest[:1] == ["submit"] and rest[1:2] != [] and rest[1] in SUBMITTED


def _submitted(words: list[str]) -> argparse.Namespace:
    """What is submit's, and inside it the verb's own arguments, parsed as the verb does, and its words as typed."""
    words = list(words)
    traceback = "--traceback" in words[: words.index("submit")]
    group, *rest = words[words.index("submit") + 1 :]
    about = f"{' or '.join(SUBMITTED[group])}, and what `minimax-train {group}` takes: as a job of Slurm's."
    outer = argparse.ArgumentParser(prog=f"minimax-train submit {group}", description=about, allow_abbrev=False)
    outer.add_argument("--cluster", metavar="FILE", type=Path, required=True, help="YAML of the cluster: see slurm/clusters")
    outer.add_argument("--dry-run", action="store_true", help="print the job scripts, write and submit nothing")
    if group == "data":
        outer.add_argument("--tasks", metavar="N", type=int, help="of the job array (default: one for each 256 MiB, at most `nodes`)")
    arguments, inner = outer.parse_known_args(rest)
    if not inner or inner[0] not in SUBMITTED[group]:
        outer.error(f"what {group} verb? submit takes {', '.join(SUBMITTED[group])}")
    arguments.words = [group, *inner]
    arguments.inner = _parser().parse_args(arguments.words)
    arguments.verb, arguments.traceback = "submit_verb", traceback
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minimax-train", description="Train, extend and convert MiniMax-type models.", allow_abbrev=False)
    parser.add_argument("--traceback", action="store_true", help="on an error, show where it came from")
    parser.add_argument("--version", action="version", version=f"minimax-train {version('minimax-train')}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def add(name: str, verb: str, about: str, *, to: Any = verbs) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = to.add_parser(name, help=about, description=about, allow_abbrev=False)
        made.set_defaults(verb=verb)
        return made

    def group(name: str, about: str) -> Any:
        return verbs.add_parser(name, help=about, description=about).add_subparsers(metavar="VERB", required=True)

    def recipe(made: argparse.ArgumentParser, *, optional: bool = False) -> argparse.ArgumentParser:
        about = "MODULE:FUNCTION, such as recipes.tiny:stdlib, or a YAML file"
        made.add_argument("recipe", metavar="RECIPE", help=about, nargs="?" if optional else None)
        made.add_argument("--set", metavar="a.b=c", action="append", default=[], dest="settings", help="change one field of the plan")
        return made

    recipe(add("show", "show", "Print the resolved plan as YAML, which is itself a RECIPE."))
    counted = recipe(add("count", "count", "Parameters and FLOPs per token, without allocating anything."))
    counted.add_argument("--json", action="store_true")
    _add_plan(recipe(add("plan", "plan", "Memory per rank of every stage on so many GPUs; refused layouts, and why. Allocates nothing.")))
    _add_train(recipe(add("train", "train", "Run every stage of a plan; goes on by itself where the run stopped.")))
    about = (
        "Put a run's stages into Slurm's queue, one job each, every one after the one before. Instead of a recipe: data prepare, convert"
    )
    about += " from-hf, to-hf or verify, evaluate needle or positions, each with its own arguments."
    submitted = recipe(add("submit", "submit", about))
    submitted.add_argument("--to", metavar="RUN", type=Path, required=True, help="the run's folder, on a file system that all nodes see")
    submitted.add_argument("--cluster", metavar="FILE", type=Path, required=True, help="YAML of the cluster: see slurm/clusters")
    submitted.add_argument("--dry-run", action="store_true", help="print the job scripts, write and submit nothing")
    _add_data(add, group("data", "Token files: prepare, inspect, verify, adopt."))
    _add_convert(add, group("convert", "Hugging Face checkpoints: from-hf, to-hf, plan, verify."))
    scored = add("logits", "logits", "Logits of given token ids, forward only.")
    scored.add_argument("checkpoint", metavar="CKPT", type=Path)
    scored.add_argument("--input-ids", metavar="FILE.safetensors", type=Path, required=True, help="holds `input_ids` [batch, tokens]")
    scored.add_argument("--to", metavar="FILE.safetensors", type=Path, required=True, help="gets `logits` [batch, tokens, vocabulary]")
    scored.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute in this precision (default: the checkpoint's)")
    evaluations = group("evaluate", "Judge a run: positions, needle.")
    positions = add("positions", "positions", "Loss by position, before and after each extension stage.", to=evaluations)
    positions.add_argument("run", metavar="RUN", type=Path)
    _add_needle(add("needle", "needle", "Facts hidden far back: how many are found, by length and depth.", to=evaluations))
    _add_generate(add("generate", "generate", "Let a small model go on from a prompt, on one rank."))
    _add_checkpoint(add, group("checkpoint", "A run's checkpoints: list, verify, copy, repair."))
    for name, verb, about in (
        ("status", "status", "Where a run stands."),
        ("report", "report", "Write RUN/report/index.html and its plots."),
    ):
        made = add(name, verb, about)
        made.add_argument("run", metavar="RUN", type=Path)
        if name == "status":
            made.add_argument("--json", action="store_true")
    _add_doctor(recipe(add("doctor", "doctor", "What this machine has, and whether a plan would run on it."), optional=True))
    return parser


def _add_train(made: argparse.ArgumentParser) -> None:
    made.add_argument("--to", metavar="RUN", type=Path, required=True, help="the run's folder")
    made.add_argument("--ranks", metavar="N", type=int, help="local processes to start (default 1); torchrun and srun bring their own")
    made.add_argument("--stage", metavar="NAME", help="this stage only, whose turn it must be; without, all that are left")
    about = "change one field of a run that was begun, from its next step on; it stays so, and is noted in RUN/overrides.jsonl"
    made.add_argument("--override", metavar="a.b=c", action="append", default=[], dest="overrides", help=about)
    made.add_argument(
        "--hang-seconds",
        metavar="S",
        type=float,
        help="a rank that holds the others up for so long is named and all end with status 70; 0: never (default: 4 on CPU, 30 on CUDA)",
    )
    made.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        default=0,
        help="of --ranks N: times that the ranks are started again after one failed or was named",
    )
    made.add_argument("--profile", action="store_true", help="trace two steps to RUN/profile")


def _add_doctor(made: argparse.ArgumentParser) -> None:
    made.add_argument("--node", metavar="DIR", type=Path, help="preflight of a job's node: write what is wrong into DIR")
    made.add_argument("--gpus", metavar="N", type=int, default=0, help="with --node: GPUs that must be there")
    made.add_argument("--space", metavar="PATH", type=Path, default=Path(), help="with --node: where the run writes")
    made.add_argument("--free-gib", metavar="N", type=int, default=0, help="with --node: free space wanted there")
    made.add_argument("--collectives", metavar="DIR", type=Path, help="preflight of a job's ranks: all talk, and say in DIR how it went")
    made.add_argument("--seconds", metavar="N", type=float, default=120.0, help="with --collectives: at most so long (default: 120)")
    made.add_argument("--least", metavar="GB/S", type=float, default=0.0, help="with --collectives: slower is wrong (default: none is)")
    made.add_argument("--device", choices=("cpu", "cuda"), help="with --collectives (default: cuda where torch can use one)")


def _add_plan(made: argparse.ArgumentParser) -> None:
    made.add_argument("--gpus", metavar="N", type=int, required=True, help="how many: ranks of the run")
    made.add_argument("--gpu", metavar="KIND", default="h800", help="h800 (the default), h100, a100 or h200")
    made.add_argument("--json", action="store_true", help="bytes, of every pipeline rank")


def _add_data(add: Any, to: Any) -> None:
    prepared = add("prepare", "data_prepare", "Text, JSONL, Parquet and saved datasets to token files.", to=to)
    prepared.add_argument("inputs", metavar="INPUT", nargs="+", help="files (.gz and .zst too), directories, saved datasets, quoted globs")
    prepared.add_argument(
        "--tokenizer", metavar="T", type=Path, required=True, help="tokenizer.json, sentencepiece .model, or their folder"
    )
    prepared.add_argument("--to", metavar="PREFIX", type=Path, required=True, help="writes PREFIX.bin, .idx, .json and the tokenizer")
    prepared.add_argument("--key", default="text", help="the text's key in JSONL lines, its column in tables (default: text)")
    prepared.add_argument("--eod", help="the tokenizer's end-of-document token (default: the first usual one it has)")
    prepared.add_argument("--workers", metavar="N", type=int, help="processes (default: one for each core); the files do not depend on it")
    prepared.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read, and count it, instead of stopping")
    choices = ("auto", "gigatoken", "reference")
    prepared.add_argument("--encoder", choices=choices, default="auto", help="auto: gigatoken where it equals the tokenizer's own library")
    prepared.add_argument("--overwrite", action="store_true", help="replace what stands at PREFIX")
    prepared.add_argument("--part", metavar="K/N", help="encode one part of N only, for a call with --parts N")
    prepared.add_argument("--parts", metavar="N", type=int, help="put together what N calls with --part have encoded")
    inspected = add("inspect", "data_inspect", "Counts, lengths, sources and samples of token files.", to=to)
    inspected.add_argument("prefix", metavar="PREFIX", type=Path)
    inspected.add_argument("--png", metavar="FILE", type=Path, help="also draw the lengths")
    inspected.add_argument("--json", action="store_true", help="print the sidecar instead")
    verified = add("verify", "data_verify", "Checksums, pointers and ids of token files.", to=to)
    verified.add_argument("prefix", metavar="PREFIX", type=Path)
    verified.add_argument("--tokenizer", metavar="T", type=Path, help="refuse the files unless this tokenizer made them")
    adopted = add("adopt", "data_adopt", "Make a dataset of Megatron's PREFIX.bin and .idx: check them, write what is missing.", to=to)
    adopted.add_argument("prefix", metavar="PREFIX", type=Path)
    adopted.add_argument("--tokenizer", metavar="T", type=Path, required=True, help="the tokenizer that made the ids")
    adopted.add_argument("--eod", help="its end-of-document token (default: the first usual one it has)")


def _add_needle(made: argparse.ArgumentParser) -> None:
    made.add_argument("checkpoint", metavar="RUN_OR_CKPT", type=Path)
    made.add_argument("--lengths", metavar="N,N,...", help="tokens (default: of the run's stages, or the longest row trained on)")
    made.add_argument(
        "--depths", metavar="N|X,X,...", default="5", help="how many, or which: 0 before all else, 1 right before the question"
    )
    made.add_argument("--tasks", metavar="T,T,...", default="single,multi_key,variables", help="default: single,multi_key,variables")
    made.add_argument(
        "--keys", metavar="N|1/N", default="4", help="hidden in multi_key: how many (default: 4), or one for each N tokens of length"
    )
    made.add_argument("--samples", metavar="N", type=int, default=8, help="of each task, length and depth (default: 8)")
    made.add_argument("--seed", metavar="N", type=int, default=1234)
    made.add_argument("--tokenizer", metavar="T", type=Path, help="default: of the run's data, or what came with the checkpoint")
    made.add_argument("--ranks", metavar="N", type=int, help="local processes to start (default 1); torchrun and srun bring their own")
    made.add_argument(
        "--set", metavar="layout.a=N", action="append", default=[], dest="settings", help="how ranks share a row and the model"
    )
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch can use one")
    made.add_argument("--to", metavar="FOLDER", type=Path, help="gets needle.json and needle.png (default: RUN/evaluation)")
    made.add_argument("--json", action="store_true", help="print what needle.json holds instead of a table")


def _add_checkpoint(add: Any, to: Any) -> None:
    for name, verb, about in (
        ("list", "checkpoint_list", "Every checkpoint of a run, and whether it is intact."),
        ("verify", "checkpoint_verify", "Fail unless every checkpoint of a run (or the one given) is intact."),
    ):
        made = add(name, verb, about, to=to)
        made.add_argument("run", metavar="RUN", type=Path)
        made.add_argument("--json", action="store_true")
    copied = add("copy", "checkpoint_copy", "Copy a checkpoint, or a run's newest, and verify what arrived.", to=to)
    copied.add_argument("checkpoint", metavar="CKPT", type=Path)
    copied.add_argument("--to", metavar="DIR", type=Path, required=True, help="a folder that is not there yet")
    repaired = add("repair", "checkpoint_repair", "Bring back damaged checkpoints of a run from copies, or set them aside.", to=to)
    repaired.add_argument("run", metavar="RUN", type=Path)
    about = "a run, or a folder with copies of them, step-... by step-... (default: the plan's checkpoints.mirror)"
    repaired.add_argument("--from", metavar="DIR", type=Path, dest="copies", help=about)


def _add_generate(made: argparse.ArgumentParser) -> None:
    made.add_argument("checkpoint", metavar="CKPT", type=Path, help="or a run, whose newest checkpoint is taken")
    prompts = made.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument("--input-ids", metavar="FILE.safetensors", type=Path, help="holds `input_ids` [batch, tokens]: a prompt a row")
    made.add_argument("--tokens", metavar="N", type=int, default=64, help="at most so many (default: 64)")
    made.add_argument("--tokenizer", metavar="T", type=Path, help="default: of the run's data, or what came with the checkpoint")
    made.add_argument("--temperature", metavar="X", type=float, default=0.0, help="0 (the default): the likeliest token")
    made.add_argument("--seed", metavar="N", type=int, default=1234)
    made.add_argument("--past-end", action="store_true", help="do not stop at the end-of-document token")
    made.add_argument("--json", action="store_true", help="print ids and text of every prompt")


def _add_convert(add: Any, to: Any) -> None:
    def shared(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument("--cast", choices=("fp32", "bf16"), help="change the weights' dtype, but for fp32 routers (default: keep it)")
        made.add_argument("--workers", metavar="N", type=int, help="processes (default: one for each core; under torchrun or srun one)")
        return made

    incoming = shared(add("from-hf", "from_hf", "A Hugging Face folder to a checkpoint; called again, goes on where it stopped.", to=to))
    incoming.add_argument("folder", metavar="DIR", type=Path)
    incoming.add_argument("--to", metavar="CKPT", type=Path, required=True)
    incoming.add_argument(
        "--layout", metavar="tensor=8,expert=4", default="", help="cut the weights so that ranks of this layout read their own only"
    )
    outgoing = shared(add("to-hf", "to_hf", "A checkpoint (or a run's newest) to a Hugging Face folder; goes on like from-hf.", to=to))
    outgoing.add_argument("checkpoint", metavar="CKPT", type=Path)
    outgoing.add_argument("--to", metavar="DIR", type=Path, required=True)
    formats = ("minimax_m1", "minimax_text_01", "minimax")
    outgoing.add_argument("--format", choices=formats, default="minimax_m1", help="minimax is transformers' own (default: minimax_m1)")
    outgoing.add_argument("--tokenizer", metavar="FILE", type=Path, help="a tokenizer.json to put beside the weights")
    outgoing.add_argument("--shard-mb", metavar="N", type=int, default=2210, help="megabytes in a file (default: 2210, as released)")
    planned = add("plan", "convert_plan", "The tensors, files and bytes of a model, without allocating anything.", to=to)
    planned.add_argument("model", metavar="MODEL", help="text01, tiny, a Hugging Face folder, or a RECIPE")
    planned.add_argument("--shard-mb", metavar="N", type=int, default=2210, help="megabytes in a file (default: 2210, as released)")
    planned.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of all but routers, which are fp32 (default: bf16)")
    planned.add_argument("--list", action="store_true", help="every tensor: file, name, dtype, shape, bytes")
    planned.add_argument("--json", action="store_true")
    verified = add("verify", "convert_verify", "Check a Hugging Face folder, and compare it with the checkpoint it was made from.", to=to)
    verified.add_argument("folder", metavar="DIR", type=Path)
    verified.add_argument("--against", metavar="CKPT", type=Path, help="compare every tensor and the logits with this checkpoint's")
    verified.add_argument("--transformers", action="store_true", help="compare the logits with transformers' own (format minimax)")
    verified.add_argument("--input-ids", metavar="FILE.safetensors", type=Path, help="ids to compare logits on (default: random ones)")
    verified.add_argument("--tokens", metavar="N", type=int, default=64, help="of the random ids (default: 64)")
    verified.add_argument("--layers", action="store_true", help="layer by layer: less memory, and names the first that differs")
    verified.add_argument("--workers", metavar="N", type=int, help="processes (default: one for each core)")
