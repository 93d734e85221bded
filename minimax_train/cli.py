"""The command line: the only reader of argv and environment.

Exit status: 0 success, 1 failure, 2 bad input, 75 stopped on SIGUSR1 with more to train, 130 interrupted; bad input and failures are one
line on standard error.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimax_train.arguments import parse

if TYPE_CHECKING:
    from minimax_train.plan import Plan  # and with it torch, which `data` and `--help` do without

Verb = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status."""
    os.umask(os.umask(0o022) | 0o002)  # no file of ours is everybody's to write, whatever the shell allows
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(words)
    try:
        return VERBS[arguments.verb](arguments)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:  # of one rank alone: it speaks, whichever it is
        print(f"minimax-train: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, FloatingPointError, OSError) as error:
        if arguments.traceback:
            raise
        _say_for_first(f"minimax-train: error: {' '.join(str(error).split())}")
        return _status_of(error)
    except KeyboardInterrupt:
        _say_for_first(
            "minimax-train: interrupted; called again, `train` goes on from the last checkpoint, `data prepare` and `convert` after their "
            "finished shards"
        )
        return 130


def _status_of(error: Exception) -> int:
    """2 for what the user gave, 1 for what went wrong."""
    return 2 if isinstance(error, (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)) else 1


def _say_for_first(line: str) -> None:
    """Ranks agree on errors (collectives.first_does), so one of them speaks."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(line, file=sys.stderr)


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


def _plan(a: argparse.Namespace) -> int:
    from minimax_train.planner.machine import find_machine
    from minimax_train.planner.report import judge
    from minimax_train.recipe import load_plan

    verdict = judge(load_plan(a.recipe, a.settings), a.gpus, find_machine(a.gpu))
    print(verdict.as_json() if a.json else verdict.table(), flush=True)
    for line in verdict.refused:
        print(f"minimax-train: refused: {line}", file=sys.stderr)
    return 2 if verdict.refused else 0


def _train(a: argparse.Namespace) -> int:
    from minimax_train.recipe import load_plan
    from minimax_train.train.override import recorded  # once torch is there, which the plan needs anyway
    from parallel.world import run_local

    plan = load_plan(a.recipe, [*a.settings, *recorded(a.to / "overrides.jsonl"), *a.overrides])
    place, ranks = _ranks(a.ranks)
    plan.check_ranks(ranks, a.stage)
    _check_device(plan)
    for name, value in (("--hang-seconds", a.hang_seconds), ("--restarts", a.restarts)):
        if value is not None and not 0 <= value < 1e9:
            raise ValueError(f"{name} is {value:g}; it must be at least 0")
    from minimax_train.train.legs import check_turn, is_over
    from minimax_train.train.pause import UNFINISHED

    if a.stage is not None:
        check_turn(plan, a.to, a.stage)
    if place is not None:
        return _train_rank(place, plan, a)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # local ranks meet on the loopback, whatever the host is called
    for left in range(a.restarts, -1, -1):
        status = run_local(_as_local, ranks, a.traceback, _train_rank, plan, a, preload=["minimax_train.train.loop"])
        if status in (0, 2) or left == 0:
            break
        print(f"minimax-train: a rank ended with status {status}: starting again ({left - 1} left)", file=sys.stderr, flush=True)
    return UNFINISHED if status == 0 and not is_over(plan, a.to, a.stage) else status


def _ranks(asked: int | None) -> tuple[Any, int]:
    """This process's place where a launcher started it, else None; and how many ranks there are or are to be."""
    from parallel.world import find_place

    place = find_place(os.environ)
    if place is not None and asked not in (None, place.size):
        raise ValueError(f"--ranks is {asked}, but the launcher started {place.size}: leave --ranks out under torchrun or srun")
    ranks = place.size if place else 1 if asked is None else asked
    if ranks < 1:
        raise ValueError(f"--ranks is {ranks}; it must be at least 1")
    return place, ranks


def _check_device(plan: "Plan") -> None:
    import torch

    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this machine has no CUDA device that torch can use: set device=cpu to run on the CPU")


def _train_rank(place: Any, plan: "Plan", a: argparse.Namespace) -> int:
    from minimax_train.engine.session import STEADY, session
    from parallel.world import meet, told_by_first

    if plan.deterministic:
        os.environ.update(STEADY)  # nothing has asked for CUDA yet

    store = meet(place)  # held to the end: later sessions of this process meet through it too

    def open_session(layout: Any, number: int) -> Any:
        return session(plan.device, layout, place, store=store, number=number, deterministic=plan.deterministic)

    from minimax_train.train.hang import pulse_of
    from minimax_train.train.legs import next_stage, train_legs
    from minimax_train.train.pause import pause_on_signal

    limit = {"cpu": 4.0, "cuda": 30.0}[plan.device] if a.hang_seconds is None else a.hang_seconds
    with pause_on_signal() as pause, pulse_of(place, a.to, limit) as pulse:
        begin = told_by_first(store, place, "next stage", lambda: next_stage(a.to))
        train_legs(plan, a.to, open_session, begin, only=a.stage, profile=a.profile, overrides=a.overrides, pause=pause, pulse=pulse)
    return 0


def _as_local(place: Any, traceback: bool, work: Callable[..., int], *arguments: Any) -> int:
    """One of --ranks N: errors are told as in `main`, by the first rank."""
    os.environ["RANK"] = str(place.rank)
    try:
        return work(place, *arguments)
    except MemoryError as error:
        print(f"minimax-train: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, FloatingPointError, OSError) as error:
        if traceback:
            raise
        _say_for_first(f"minimax-train: error: {' '.join(str(error).split())}")
        return _status_of(error)


def _submit(a: argparse.Namespace) -> int:
    from minimax_train.recipe import as_yaml, load_plan
    from minimax_train.train.override import recorded
    from slurm.cluster import load_cluster
    from slurm.submit import jobs_of

    run, cluster = a.to.resolve(), load_cluster(a.cluster)
    plan = load_plan(a.recipe, [*a.settings, *recorded(run / "overrides.jsonl")])
    for stage in plan.stages:
        plan.check_ranks(cluster.ranks_of(stage.name), stage.name)
    left = [stage.name for stage in plan.stages if not (run / "finished" / stage.name).exists()]
    if not left:
        raise ValueError(f"every stage of {run} is finished: there is nothing to submit")
    jobs = jobs_of(name=plan.name, stages=left, run=run, directory=Path.cwd(), cluster=cluster)
    return _into_queue(a, jobs, run / "slurm", {"plan.yaml": as_yaml(plan)}, "stage")


def _submit_verb(a: argparse.Namespace) -> int:
    from minimax_train.submitting import convert_job, evaluate_job, prepare_jobs
    from slurm.cluster import load_cluster
    from slurm.submit import jobs_of_verbs

    cluster, (group, action) = load_cluster(a.cluster), a.words[:2]
    if group == "data":
        wanted = prepare_jobs(a.inner, a.words, cluster, a.tasks)
    elif group == "convert":
        wanted = convert_job(a.inner, a.words, cluster, action)
    else:
        if action == "needle":
            _asked(a.inner)
        wanted = evaluate_job(a.inner, a.words, cluster, action)
    jobs = jobs_of_verbs(wanted.verbs, name=wanted.name, folder=wanted.folder, directory=Path.cwd(), cluster=cluster)
    return _into_queue(a, jobs, wanted.folder, {}, "job of")


def _into_queue(a: argparse.Namespace, jobs: Any, folder: Path, files: dict[str, str], what: str) -> int:
    """Prints the scripts, or submits them and says which jobs they are."""
    import minimax_train
    from slurm.cluster import load_cluster
    from slurm.submit import submit

    if a.dry_run:
        for job in jobs:
            print(f"# {job.path}\n{job.text}")
        return 0
    home = Path(minimax_train.__file__).resolve().parent.parent
    files = {**files, "cluster.yaml": a.cluster.read_text()}
    for queued in submit(jobs, folder=folder, files=files, cluster=load_cluster(a.cluster), home=home):
        print(f"{what} {queued['stage']}: job {queued['job']}")
    return 0


def _data_prepare(a: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes do it, --workers of them
    from data.parts import Share, share_of
    from data.prepare import prepare, prepare_part
    from data.tokenizer import load_tokenizer

    if a.part is not None and a.parts is not None:
        raise ValueError("--part encodes one part, --parts puts them together: give one of the two")
    share = None if a.part is None else share_of(a.part)
    parts = 0 if a.parts is None else Share(count=a.parts).count
    workers = len(os.sched_getaffinity(0)) if a.workers is None else a.workers
    tokenizer = load_tokenizer(a.tokenizer, eod=a.eod)
    options = {"key": a.key, "overwrite": a.overwrite, "skip_bad": a.skip_bad, "workers": workers, "encoder": a.encoder}
    if share is not None:
        shards = prepare_part(a.inputs, tokenizer, a.to, share, **options)
        documents, tokens = (sum(getattr(facts, name) for facts in shards) for name in ("documents", "tokens"))
        print(f"{a.to}: part {share}: {len(shards):,} shards, {documents:,} documents, {tokens:,} tokens")
        return 0
    sidecar = prepare(a.inputs, tokenizer, a.to, parts=parts, **options)
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


def _processes(asked: int | None) -> tuple[int, bool]:
    """How many processes this one starts, and whether it is one of several that a launcher started, but not the first."""
    from parallel.world import find_place

    if asked is not None and asked < 1:
        raise ValueError(f"--workers is {asked}; it must be at least 1")
    place = find_place(os.environ)
    alone = len(os.sched_getaffinity(0)) if place is None or place.size == 1 else 1
    return asked or alone, place is not None and place.rank > 0


def _from_hf(a: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)  # processes do it, --workers of them
    from minimax_train.convert.from_hf import from_hf
    from minimax_train.model.count import count_parameters

    workers, helps = _processes(a.workers)
    if helps and a.to.exists():
        return 0  # the first one finished it before this one started
    record = from_hf(a.folder, a.to, cast=a.cast, layout=_layout(a.layout), workers=workers, quiet=helps)
    if not helps:
        print(f"{a.to}: {count_parameters(record.model).total:,} parameters in {record.precision}, RoPE base {record.rope_base:g}")
    return 0


def _layout(text: str) -> Any:
    """tensor=8,expert=4 as a Layout."""
    from dataclasses import replace

    from parallel.layout import DEGREES, Layout

    degrees: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, number = item.partition("=")
        if name not in DEGREES or not number.isdecimal():
            raise ValueError(f"--layout {text!r}: {item!r} is not one of {', '.join(f'{name}=N' for name in DEGREES)}")
        degrees[name] = int(number)
    return replace(Layout(), **degrees)  # type: ignore[arg-type]  # the degrees are its integer fields


def _to_hf(a: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)
    from minimax_train.checkpoint.shelf import resolve
    from minimax_train.convert.to_hf import to_hf

    if a.tokenizer is not None and not a.tokenizer.is_file():
        raise ValueError(f"--tokenizer {a.tokenizer}: no such file")
    workers, helps = _processes(a.workers)
    if helps and a.to.exists():
        return 0
    checkpoint = resolve(a.checkpoint)
    to_hf(checkpoint, a.to, a.format, tokenizer=a.tokenizer, cast=a.cast, shard_bytes=_megabytes(a.shard_mb), workers=workers, quiet=helps)
    if not helps:
        print(f"{a.to}: {checkpoint} in {a.format} format")
    return 0


def _megabytes(number: int) -> int:
    if number < 1:
        raise ValueError(f"--shard-mb is {number}; it must be at least 1")
    return number * 1_000_000


def _convert_plan(a: argparse.Namespace) -> int:
    from minimax_train.convert.plan import plan_export

    print(plan_export(a.model, a.precision, _megabytes(a.shard_mb)).text(listed=a.list, as_json=a.json))
    return 0


def _convert_verify(a: argparse.Namespace) -> int:
    if a.against is None and not a.transformers and (a.input_ids or a.layers):
        raise ValueError("--input-ids and --layers are for a comparison: give --against CKPT or --transformers")
    if a.tokens < 1:
        raise ValueError(f"--tokens is {a.tokens}; it must be at least 1")
    workers, _ = _processes(a.workers)
    from minimax_train.engine.session import session

    with session() as alone:
        from minimax_train.checkpoint.shelf import resolve
        from minimax_train.convert.stored import StoredModel
        from minimax_train.convert.verify import Verifier, choose_ids

        verifier = Verifier(a.folder, workers=workers)
        print(verifier.alone(), flush=True)
        ids = choose_ids(a.input_ids, a.tokens, verifier.source.described.model)
        same = True
        if a.against is not None:
            for found in verifier.against(StoredModel.open(resolve(a.against)), alone, ids, layers=a.layers):
                print("\n".join(found.lines), flush=True)
                same = same and found.same
        if a.transformers:
            found = verifier.elsewhere(alone, ids, layers=a.layers)
            print("\n".join(found.lines))
            same = same and found.same
    return 0 if same else 1


def _logits(a: argparse.Namespace) -> int:
    from minimax_train.engine.session import session

    with session() as alone:
        from minimax_train.evaluate.logits import write_logits

        precision: Any = {None: None, "float32": "fp32", "bfloat16": "bf16"}[a.dtype]
        shape = write_logits(a.checkpoint, a.input_ids, a.to, alone, precision)
    print(f"{a.to}: logits {shape}")
    return 0


def _positions(a: argparse.Namespace) -> int:
    from minimax_train.engine.session import session

    with session() as alone:
        from minimax_train.evaluate.positions import evaluate_positions, positions_table

        print(positions_table(evaluate_positions(a.run, alone)))
    return 0


def _asked(a: argparse.Namespace) -> Any:
    from minimax_train.evaluate.grid import Asked, depths_of, keys_of, lengths_of, tasks_of

    return Asked(
        lengths=None if a.lengths is None else lengths_of(a.lengths),
        depths=depths_of(a.depths),
        tasks=tasks_of(a.tasks.split(",")),
        samples=a.samples,
        seed=a.seed,
        keys=keys_of(a.keys),
    )


def _needle(a: argparse.Namespace) -> int:
    import torch

    from minimax_train.evaluate.grid import layout_of
    from minimax_train.evaluate.tokenizer import run_of
    from parallel.world import run_local

    asked = _asked(a)
    layout, (place, ranks) = layout_of(a.settings), _ranks(a.ranks)
    layout.data(ranks)  # refuses what does not fit
    if a.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but this machine has no CUDA device that torch can use: leave --device out")
    device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = run_of(a.checkpoint)
    final = a.to / "needle.json" if a.to is not None else None if run is None else run.needle
    name = a.checkpoint.resolve().name if run is None else run.load_plan().name
    if place is not None:
        return _needle_rank(place, layout, device, asked, a, final, name)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return run_local(
        _as_local, ranks, a.traceback, _needle_rank, layout, device, asked, a, final, name, preload=["minimax_train.evaluate.needle_run"]
    )


def _needle_rank(place: Any, layout: Any, device: Any, asked: Any, a: argparse.Namespace, final: Path | None, name: str) -> int:
    from minimax_train.engine.session import session

    with session(device, layout, place) as joined:
        from minimax_train.evaluate.needle import needle_table
        from minimax_train.evaluate.needle_run import evaluate_needle, write_needles

        def told(line: str) -> None:
            if joined.is_first:
                print(line, file=sys.stderr, flush=True)

        needles = evaluate_needle(a.checkpoint, asked, a.tokenizer, joined, told)
        if joined.is_first:
            print(needles.dump() if a.json else needle_table(needles.cells))
            if final is None:
                told("nothing is written: this is no run's checkpoint; say --to FOLDER for needle.json and needle.png")
            else:
                write_needles(needles, final, name)
    return 0


def _generate(a: argparse.Namespace) -> int:
    if a.tokens < 0:
        raise ValueError(f"--tokens is {a.tokens}; it must be at least 0")
    _, ranks = _ranks(None)
    if ranks > 1:
        raise ValueError(f"the launcher started {ranks} ranks; generate runs a small model on one: call it without a launcher")
    from minimax_train.engine.session import session

    with session() as alone:
        from minimax_train.evaluate.generate import Choosing
        from minimax_train.evaluate.prompts import go_on

        choosing = Choosing(temperature=a.temperature, seed=a.seed)
        ids = a.prompt if a.input_ids is None else a.input_ids
        made = go_on(a.checkpoint, ids, alone, choosing, tokens=a.tokens, tokenizer=a.tokenizer, past_end=a.past_end)
    if a.json:
        print(json.dumps([vars(one) for one in made], indent=1))
    else:
        for one in made:
            print(" ".join(map(str, one.ids)) if one.text is None else one.text)
    return 0


def _checkpoint_list(a: argparse.Namespace) -> int:
    from minimax_train.checkpoint.verbs import tell_all

    tell_all(a.run, as_json=a.json)
    return 0


def _checkpoint_verify(a: argparse.Namespace) -> int:
    from minimax_train.checkpoint.verbs import tell_all

    return 0 if tell_all(a.run, as_json=a.json) else 1


def _checkpoint_copy(a: argparse.Namespace) -> int:
    from minimax_train.checkpoint.verbs import copy

    copy(a.checkpoint, a.to)
    return 0


def _checkpoint_repair(a: argparse.Namespace) -> int:
    from minimax_train.checkpoint.verbs import repair_run

    return 0 if repair_run(a.run, a.copies) else 1


def _status(a: argparse.Namespace) -> int:
    from minimax_train.train.status import run_status
    from slurm.ask import job_state
    from slurm.submit import excluded, recorded

    status, folder = run_status(a.run), a.run / "slurm"
    if jobs := [*recorded(folder), *recorded(folder / "evaluate")]:
        status["jobs"] = [{**job, "state": job_state(job["job"]) or "ended"} for job in jobs]
        status["excluded_nodes"] = excluded(folder)
    if a.json:
        print(json.dumps(status, indent=1))
    else:
        for name, value in status.items():
            said = "; ".join(f"{job['stage']} {job['job']} {job['state']}" for job in value) if name == "jobs" else value
            print(f"{name.replace('_', ' '):24}{said}")
    return 0


def _report(a: argparse.Namespace) -> int:
    from minimax_train.report.page import write_report
    from minimax_train.train.folder import RunFolder

    print(write_report(RunFolder(a.run).require().path))
    return 0


def _doctor(a: argparse.Namespace) -> int:
    if a.collectives is not None:
        return _collectives(a)
    if a.node is not None:
        from minimax_train.preflight import check_node

        name = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        wrong = check_node(a.node, name, gpus=a.gpus, space=a.space, free_gib=a.free_gib)
        print(f"preflight: {name}: {'; '.join(wrong) or 'good'}", file=sys.stderr)
        return 0
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


def _collectives(a: argparse.Namespace) -> int:
    import torch

    from minimax_train.collectives import check_collectives
    from parallel.world import Place, find_place

    if not 0 < a.seconds < float("inf"):
        raise ValueError(f"--seconds is {a.seconds}; it must be a positive number")
    place = find_place(os.environ) or Place()
    device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    good = check_collectives(a.collectives, name, place, device, seconds=a.seconds, least=a.least)
    if place.rank == 0:
        print((a.collectives / f"{name}.0.collectives").read_text(), end="", file=sys.stderr)
    return 0 if good else 1


VERBS: dict[str, Verb] = {
    "show": _show,
    "count": _count,
    "plan": _plan,
    "train": _train,
    "submit": _submit,
    "submit_verb": _submit_verb,
    "data_prepare": _data_prepare,
    "data_inspect": _data_inspect,
    "data_verify": _data_verify,
    "data_adopt": _data_adopt,
    "from_hf": _from_hf,
    "to_hf": _to_hf,
    "convert_plan": _convert_plan,
    "convert_verify": _convert_verify,
    "logits": _logits,
    "positions": _positions,
    "needle": _needle,
    "generate": _generate,
    "checkpoint_list": _checkpoint_list,
    "checkpoint_verify": _checkpoint_verify,
    "checkpoint_copy": _checkpoint_copy,
    "checkpoint_repair": _checkpoint_repair,
    "status": _status,
    "report": _report,
    "doctor": _doctor,
}
"""By the names that arguments.py gives them."""


if __name__ == "__main__":
    sys.exit(main())
