"""The command line: the only reader of argv and environment.

Exit status: 0 success, 1 failure, 2 bad input, 130 interrupted; bad input and failures are one line on standard error.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimax_train.plan import Plan  # and with it torch, which `data` and `--help` do without

Verb = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status."""
    arguments = _parser().parse_args(argv)
    verb: Verb = arguments.verb
    try:
        return verb(arguments)
    except (ValueError, FloatingPointError, OSError) as error:
        if arguments.traceback:
            raise
        _say_for_first(f"minimax-train: error: {' '.join(str(error).split())}")
        return _status_of(error)
    except KeyboardInterrupt:
        _say_for_first(
            "minimax-train: interrupted; called again, `train` goes on from the last checkpoint, `data prepare` after its finished shards"
        )
        return 130


def _status_of(error: Exception) -> int:
    """2 for what the user gave, 1 for what went wrong."""
    return 2 if isinstance(error, (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)) else 1


def _say_for_first(line: str) -> None:
    """Ranks agree on errors (collectives.first_does), so one of them speaks."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(line, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minimax-train", description="Train, extend and convert MiniMax-type models.", allow_abbrev=False)
    parser.add_argument("--traceback", action="store_true", help="on an error, show where it came from")
    parser.add_argument("--version", action="version", version=f"minimax-train {version('minimax-train')}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def add(name: str, verb: Verb, about: str, *, to: Any = verbs) -> argparse.ArgumentParser:
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

    recipe(add("show", _show, "Print the resolved plan as YAML, which is itself a RECIPE."))
    counted = recipe(add("count", _count, "Parameters and FLOPs per token, without allocating anything."))
    counted.add_argument("--json", action="store_true")
    trained = recipe(add("train", _train, "Run every stage of a plan; goes on by itself where the run stopped."))
    trained.add_argument("--to", metavar="RUN", type=Path, required=True, help="the run's folder")
    trained.add_argument("--ranks", metavar="N", type=int, help="local processes to start (default 1); torchrun and srun bring their own")
    trained.add_argument("--profile", action="store_true", help="trace two steps to RUN/profile")
    _add_data(add, group("data", "Token files: prepare, inspect, verify, adopt."))
    _add_convert(add, group("convert", "Hugging Face checkpoints: from-hf, to-hf."))
    scored = add("logits", _logits, "Logits of given token ids, forward only.")
    scored.add_argument("checkpoint", metavar="CKPT", type=Path)
    scored.add_argument("--input-ids", metavar="FILE.safetensors", type=Path, required=True, help="holds `input_ids` [batch, tokens]")
    scored.add_argument("--to", metavar="FILE.safetensors", type=Path, required=True, help="gets `logits` [batch, tokens, vocabulary]")
    scored.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute in this precision (default: the checkpoint's)")
    positions = add(
        "positions", _positions, "Loss by position, before and after each extension stage.", to=group("evaluate", "Judge a run.")
    )
    positions.add_argument("run", metavar="RUN", type=Path)
    checkpoints = group("checkpoint", "A run's checkpoints: list, verify.")
    for name, verb, about in (
        ("list", _checkpoint_list, "Every checkpoint of a run, and whether it is intact."),
        ("verify", _checkpoint_verify, "Fail unless every checkpoint of a run (or the one given) is intact."),
    ):
        add(name, verb, about, to=checkpoints).add_argument("run", metavar="RUN", type=Path)
    for name, verb, about in (
        ("status", _status, "Where a run stands."),
        ("report", _report, "Write RUN/report/index.html and its plots."),
    ):
        made = add(name, verb, about)
        made.add_argument("run", metavar="RUN", type=Path)
        if name == "status":
            made.add_argument("--json", action="store_true")
    recipe(add("doctor", _doctor, "What this machine has, and whether a plan would run on it."), optional=True)
    return parser


def _add_data(add: Any, to: Any) -> None:
    prepared = add("prepare", _data_prepare, "Text, JSONL, Parquet and saved datasets to token files.", to=to)
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
    inspected = add("inspect", _data_inspect, "Counts, lengths, sources and samples of token files.", to=to)
    inspected.add_argument("prefix", metavar="PREFIX", type=Path)
    inspected.add_argument("--png", metavar="FILE", type=Path, help="also draw the lengths")
    inspected.add_argument("--json", action="store_true", help="print the sidecar instead")
    verified = add("verify", _data_verify, "Checksums, pointers and ids of token files.", to=to)
    verified.add_argument("prefix", metavar="PREFIX", type=Path)
    verified.add_argument("--tokenizer", metavar="T", type=Path, help="refuse the files unless this tokenizer made them")
    adopted = add("adopt", _data_adopt, "Make a dataset of Megatron's PREFIX.bin and .idx: check them, write what is missing.", to=to)
    adopted.add_argument("prefix", metavar="PREFIX", type=Path)
    adopted.add_argument("--tokenizer", metavar="T", type=Path, required=True, help="the tokenizer that made the ids")
    adopted.add_argument("--eod", help="its end-of-document token (default: the first usual one it has)")


def _add_convert(add: Any, to: Any) -> None:
    incoming = add("from-hf", _from_hf, "A Hugging Face folder to a checkpoint.", to=to)
    incoming.add_argument("folder", metavar="DIR", type=Path)
    incoming.add_argument("--to", metavar="CKPT", type=Path, required=True)
    outgoing = add("to-hf", _to_hf, "A checkpoint (or a run's newest) to a Hugging Face folder.", to=to)
    outgoing.add_argument("checkpoint", metavar="CKPT", type=Path)
    outgoing.add_argument("--to", metavar="DIR", type=Path, required=True)
    formats = ("minimax_m1", "minimax_text_01", "minimax")
    outgoing.add_argument("--format", choices=formats, default="minimax_m1", help="minimax is transformers' own (default: minimax_m1)")
    outgoing.add_argument("--tokenizer", metavar="FILE", type=Path, help="a tokenizer.json to put beside the weights")


def _show(a: argparse.Namespace) -> int:
    from minimax_train.recipe import as_yaml, load_plan

    print(as_yaml(load_plan(a.recipe, a.settings)), end="")
    return 0


def _count(a: argparse.Namespace) -> int:
    from minimax_train.model.count import count_parameters, forward_flops, training_flops
    from minimax_train.recipe import load_plan

    plan = load_plan(a.recipe, a.settings)
    counts: dict[str, Any] = dict(count_parameters(plan.model).as_dict())
    lengths = dict.fromkeys(stage.length for stage in plan.stages)
    counts["flops_per_token"] = {
        str(n): {
            "forward": forward_flops(plan.model, tokens=n, squares=n * n) / n,
            "training": training_flops(plan.model, tokens=n, squares=n * n) / n,
        }
        for n in lengths
    }
    if a.json:
        print(json.dumps(counts, indent=1))
        return 0
    for name, value in counts.items():
        if isinstance(value, int):
            print(f"{name:24}{value:>20,}")
    for length, flops in counts["flops_per_token"].items():
        forward, training = (flops[kind] / 1e9 for kind in ("forward", "training"))
        print(f"GFLOP per token at one document of {int(length):,}: forward {forward:.4g}, training {training:.4g}")
    return 0


def _train(a: argparse.Namespace) -> int:
    from minimax_train.recipe import load_plan
    from parallel.world import find_place, run_local

    plan = load_plan(a.recipe, a.settings)
    place = find_place(os.environ)
    if place is not None and a.ranks not in (None, place.size):
        raise ValueError(f"--ranks is {a.ranks}, but the launcher started {place.size}: leave --ranks out under torchrun or srun")
    ranks = place.size if place else 1 if a.ranks is None else a.ranks
    if ranks < 1:
        raise ValueError(f"--ranks is {ranks}; it must be at least 1")
    plan.check_ranks(ranks)
    _check_device(plan)
    if place is not None:
        return _train_rank(place, plan, a.to, a.profile)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # local ranks meet on the loopback, whatever the host is called
    return run_local(_train_as_local, ranks, plan, a.to, a.profile, a.traceback)


def _check_device(plan: "Plan") -> None:
    import torch

    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this machine has no CUDA device that torch can use: set device=cpu to run on the CPU")


def _train_rank(place: Any, plan: "Plan", run: Path, profile: bool) -> int:
    from minimax_train.engine.session import session

    with session(plan.device, plan.layout, place) as joined:
        from minimax_train.train.loop import train

        train(plan, run, joined, profile=profile)
    return 0


def _train_as_local(place: Any, plan: "Plan", run: Path, profile: bool, traceback: bool) -> int:
    """One of --ranks N: errors are told as in `main`, by the first rank."""
    os.environ["RANK"] = str(place.rank)
    try:
        return _train_rank(place, plan, run, profile)
    except (ValueError, FloatingPointError, OSError) as error:
        if traceback:
            raise
        _say_for_first(f"minimax-train: error: {' '.join(str(error).split())}")
        return _status_of(error)


def _data_prepare(a: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes do it, --workers of them
    from data.prepare import prepare
    from data.tokenizer import load_tokenizer

    workers = len(os.sched_getaffinity(0)) if a.workers is None else a.workers
    sidecar = prepare(
        a.inputs,
        load_tokenizer(a.tokenizer, eod=a.eod),
        a.to,
        key=a.key,
        overwrite=a.overwrite,
        skip_bad=a.skip_bad,
        workers=workers,
        encoder=a.encoder,
    )
    left_out = f"; {sidecar.bad:,} bad documents left out, the first: {sidecar.skipped[0]}" if sidecar.bad else ""
    print(f"{a.to}: {sidecar.documents:,} documents, {sidecar.tokens:,} tokens{left_out}")
    return 0


def _data_inspect(a: argparse.Namespace) -> int:
    from data.dataset import TokenDataset
    from data.inspect import draw_lengths, inspect

    print(TokenDataset.open(a.prefix).sidecar.dump() if a.json else inspect(a.prefix))
    if a.png is not None:
        draw_lengths(a.prefix, a.png)
    return 0


def _data_verify(a: argparse.Namespace) -> int:
    from data.dataset import verify
    from data.tokenizer import load_tokenizer

    dataset = verify(a.prefix, tokenizer=load_tokenizer(a.tokenizer) if a.tokenizer else None)
    print(f"{a.prefix}: intact; {dataset.documents:,} documents, {dataset.token_count:,} tokens, every checksum, pointer and id holds")
    return 0


def _data_adopt(a: argparse.Namespace) -> int:
    from data.adopt import adopt
    from data.tokenizer import load_tokenizer

    sidecar = adopt(a.prefix, load_tokenizer(a.tokenizer, eod=a.eod))
    inside = f"; {sidecar.inner_ends:,} end-of-document ids stand inside documents" if sidecar.inner_ends else ""
    print(f"{a.prefix}: {sidecar.documents:,} documents, {sidecar.tokens:,} tokens, every pointer and id holds{inside}")
    return 0


def _from_hf(a: argparse.Namespace) -> int:
    from minimax_train.engine.session import session

    with session() as alone:
        from minimax_train.convert.from_hf import from_hf
        from minimax_train.model.count import count_parameters

        record = from_hf(a.folder, a.to, alone)
    print(f"{a.to}: {count_parameters(record.model).total:,} parameters in {record.precision}, RoPE base {record.rope_base:g}")
    return 0


def _to_hf(a: argparse.Namespace) -> int:
    from minimax_train.engine.session import session

    if a.tokenizer is not None and not a.tokenizer.is_file():
        raise ValueError(f"--tokenizer {a.tokenizer}: no such file")
    with session() as alone:
        from minimax_train.checkpoint.shelf import resolve
        from minimax_train.convert.to_hf import to_hf

        checkpoint = resolve(a.checkpoint)
        to_hf(checkpoint, a.to, a.format, alone, tokenizer=a.tokenizer)
    print(f"{a.to}: {checkpoint} in {a.format} format")
    return 0


def _logits(a: argparse.Namespace) -> int:
    from minimax_train.engine.session import session

    with session() as alone:
        from minimax_train.checkpoint.shelf import resolve
        from minimax_train.evaluate.logits import write_logits

        precision: Any = {None: None, "float32": "fp32", "bfloat16": "bf16"}[a.dtype]
        shape = write_logits(resolve(a.checkpoint), a.input_ids, a.to, alone, precision)
    print(f"{a.to}: logits {shape}")
    return 0


def _positions(a: argparse.Namespace) -> int:
    from minimax_train.engine.session import session

    with session() as alone:
        from minimax_train.evaluate.positions import evaluate_positions, positions_table

        print(positions_table(evaluate_positions(a.run, alone)))
    return 0


def _checkpoint_list(a: argparse.Namespace) -> int:
    return 0 if _print_checkpoints(a.run, only_damaged=False) else 2


def _checkpoint_verify(a: argparse.Namespace) -> int:
    return 0 if _print_checkpoints(a.run, only_damaged=True) else 1


def _print_checkpoints(path: Path, *, only_damaged: bool) -> bool:
    """One line each; True when there is one at least and (when verifying) all are intact."""
    from minimax_train.checkpoint.manifest import damage
    from minimax_train.checkpoint.shelf import checkpoints_in

    inside = path / "checkpoints"
    found = checkpoints_in(inside) if inside.is_dir() else [path] if (path / "checkpoint.json").is_file() else []
    if not found:
        raise ValueError(f"{path} is neither a run with checkpoints nor a checkpoint")
    wrong = {checkpoint: damage(checkpoint) for checkpoint in found}
    for checkpoint, problem in wrong.items():
        print(f"{checkpoint}: {problem or 'intact'}")
    return not (only_damaged and any(wrong.values()))


def _status(a: argparse.Namespace) -> int:
    from minimax_train.train.status import run_status

    status = run_status(a.run)
    if a.json:
        print(json.dumps(status, indent=1))
    else:
        for name, value in status.items():
            print(f"{name.replace('_', ' '):24}{value}")
    return 0


def _report(a: argparse.Namespace) -> int:
    from minimax_train.report.page import write_report
    from minimax_train.train.folder import RunFolder

    print(write_report(RunFolder(a.run).require().path))
    return 0


def _doctor(a: argparse.Namespace) -> int:
    from minimax_train.doctor import examine
    from minimax_train.recipe import load_plan

    findings = examine()
    for name, value in findings.items():
        print(f"{name:24}{value}")
    if a.recipe:
        plan = load_plan(a.recipe, a.settings)
        _check_device(plan)
        print(f"{'plan':24}{plan.name}: loads, fits device {plan.device}; {plan.total_steps} steps in {len(plan.stages)} stages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
