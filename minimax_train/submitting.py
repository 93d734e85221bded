"""`submit` of verbs other than `train`: whether what is asked can be done, before any job is, and the jobs that do it.

Every function takes the verb's own arguments as parsed, and its words as typed; ValueError, in one line, for what cannot be.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm.cluster import Cluster
from slurm.script import Verb, cpus_of, nodes_of

SLICES_A_TASK = 16
"""Fewest slices of input that are worth a task of the array."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Jobs, one after the other; `name` is in theirs, `folder` gets their scripts."""

    name: str
    folder: Path
    verbs: tuple[Verb, ...]


def prepare_jobs(a: Namespace, words: Sequence[str], cluster: Cluster, tasks: int | None) -> Submission:
    """A job array whose tasks encode a part each, and a job that puts the parts together and verifies them."""
    from data.corpus import find_sources
    from data.parts import Share
    from data.prepare import refuse_existing, refuse_output_among_inputs
    from data.slices import SLICE
    from data.tokenizer import load_tokenizer

    if a.part is not None or a.parts is not None:
        raise ValueError("--part and --parts are what submit gives its jobs: leave them out, and say --tasks N")
    if tasks is not None:
        if tasks < 1:
            raise ValueError(f"--tasks is {tasks}; it must be at least 1")
        Share(count=tasks)
    load_tokenizer(a.tokenizer, eod=a.eod)
    size = sum(source.size for source in find_sources(a.inputs))
    refuse_output_among_inputs(a.to, a.inputs)
    refuse_existing(a.to, overwrite=a.overwrite)
    count = tasks or min(cluster.nodes, 1 + size // (SLICES_A_TASK * SLICE))
    encode = Verb(job="prepare", about="One part of the token files a task", commands=(tuple(words),), array=count)
    whole = Verb(job="merge", about="The parts of the token files put together and verified", commands=(tuple(words),))
    workers = () if a.workers is not None else ("--workers", str(cpus_of(encode, cluster)))
    verify = ("data", "verify", str(a.to), "--tokenizer", str(a.tokenizer))
    return Submission(
        name=a.to.name,
        folder=_beside(a.to),
        verbs=(
            _with_words(encode, (*words, *workers)),
            _with_words(whole, (*words, "--parts", str(count), *workers), verify),
        ),
    )


def convert_job(a: Namespace, words: Sequence[str], cluster: Cluster, action: str) -> Submission:
    """from-hf and to-hf on as many nodes as asked for, verify on one; all on processors."""
    verb = Verb(job="convert", about=f"convert {action}", commands=(tuple(words),))
    nodes = nodes_of(verb, cluster)
    if action == "verify":
        if nodes > 1:
            raise ValueError(f"jobs.convert.nodes is {nodes}; convert verify runs on one node: leave it out for this job")
        _check_verify(a)
    elif action == "from-hf":
        _check_from_hf(a)
    else:
        _check_to_hf(a)
    workers = () if a.workers is not None else ("--workers", str(cpus_of(verb, cluster)))
    written = a.folder if action == "verify" else a.to
    return Submission(name=written.resolve().name, folder=_beside(written), verbs=(_with_words(verb, (*words, *workers)),))


def evaluate_job(a: Namespace, words: Sequence[str], cluster: Cluster, action: str) -> Submission:
    """Needles on the run's nodes, a rank for every GPU; loss by position on one rank."""
    from minimax_train.checkpoint.shelf import checkpoints_in, looks_whole, resolve
    from minimax_train.evaluate.tokenizer import run_of
    from minimax_train.train.folder import RunFolder

    verb = Verb(job="evaluate", about=f"evaluate {action}", commands=(tuple(words),), whole_run=action == "needle")
    if action == "positions":
        run = RunFolder(a.run).require()
        if not run.checkpoints.is_dir() or not checkpoints_in(run.checkpoints):
            raise ValueError(f"run {a.run} has no checkpoint yet: there is nothing to evaluate")
        return Submission(name=run.load_plan().name, folder=_inside(a.run), verbs=(verb,))
    from minimax_train.evaluate.grid import layout_of

    if a.ranks is not None:
        raise ValueError("--ranks is what the cluster's file says: leave it out")
    layout_of(a.settings).data(nodes_of(verb, cluster) * cluster.ranks_per_node)  # refuses what does not fit
    if a.device == "cuda" and not cluster.gpus_per_node:
        raise ValueError("--device is cuda, but the cluster's file asks for no GPUs: set gpus_per_node, or leave --device out")
    found = run_of(a.checkpoint)
    if found is None and a.to is None:
        raise ValueError(f"{a.checkpoint} is no run's checkpoint: say --to FOLDER for needle.json, or nothing would be written")
    checkpoint = resolve(a.checkpoint, looks_whole)
    if not (checkpoint / "checkpoint.json").is_file():
        raise ValueError(f"{a.checkpoint} is neither a run with checkpoints nor a checkpoint")
    if a.to is not None:
        return Submission(name=a.to.resolve().name, folder=_inside(a.to), verbs=(verb,))
    assert found is not None
    return Submission(name=found.load_plan().name, folder=_inside(found.path), verbs=(verb,))


def _beside(written: Path) -> Path:
    """TO.slurm, for what must not have a folder of ours in it."""
    path = written.resolve()
    return path.with_name(f"{path.name}.slurm")


def _inside(folder: Path) -> Path:
    """Not the folder of a chain that may be running: its code stays as it is."""
    return folder.resolve() / "slurm" / "evaluate"


def _with_words(verb: Verb, *commands: tuple[str, ...]) -> Verb:
    """The same job with other commands."""
    return replace(verb, commands=commands)


def _check_from_hf(a: Namespace) -> None:
    from minimax_train.convert import carried
    from minimax_train.convert.source import open_source
    from minimax_train.convert.work import refuse_existing
    from minimax_train.recipe import load_layout

    refuse_existing(a.to)
    layout = load_layout([f"layout.{item}" for item in a.layout.split(",") if item])
    source = open_source(a.folder)
    source.described.model.check_tensor(layout.tensor)
    source.described.model.check_experts(layout.expert, layout.expert_tensor)
    carried.check(a.folder, source.raw_config)


def _check_to_hf(a: Namespace) -> None:
    from minimax_train.checkpoint.record import read_record
    from minimax_train.checkpoint.shelf import looks_whole, resolve
    from minimax_train.convert.work import refuse_existing

    refuse_existing(a.to)
    if a.tokenizer is not None and not a.tokenizer.is_file():
        raise ValueError(f"--tokenizer {a.tokenizer}: no such file")
    if a.shard_mb < 1:
        raise ValueError(f"--shard-mb is {a.shard_mb}; it must be at least 1")
    checkpoint = resolve(a.checkpoint, looks_whole)
    if not (checkpoint / "checkpoint.json").is_file():
        raise ValueError(f"{a.checkpoint} is neither a run with checkpoints nor a checkpoint")
    read_record(checkpoint)


def _check_verify(a: Namespace) -> None:
    from minimax_train.checkpoint.shelf import looks_whole, resolve
    from minimax_train.convert.source import open_source
    from minimax_train.convert.stored import StoredModel

    open_source(a.folder)
    if a.against is not None:
        StoredModel.open(resolve(a.against, looks_whole))
