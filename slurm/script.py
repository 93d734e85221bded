"""Job scripts from templates/: the same input gives the same text."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slurm.cluster import Cluster, Container, OfVerb

PATH = re.compile(r"/[A-Za-z0-9_.,:@+=/-]+")
JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb other than `train`, as a job of its own."""

    job: str
    """prepare, merge, convert or evaluate: what the cluster's file calls it, and the script's name."""
    about: str
    """What it does: a line of the script, so without anything that a user named."""
    commands: tuple[tuple[str, ...], ...]
    """Words behind `minimax-train`, one command after the other."""
    array: int = 0
    """Tasks of a job array; each does its `--part`."""
    whole_run: bool = False
    """Wants the run's nodes, with a rank for every GPU; else one task a node, with all its processors."""


def job_script(*, name: str, stage: str, run: Path, directory: Path, cluster: Cluster) -> str:
    """The text of the job of `stage`. `run` and `directory` (where relative paths of the plan begin) are absolute.

    ValueError where a name or a path cannot stand in a line of #SBATCH.
    """
    _check_paths(cluster, run, directory)
    for what, word in (("the plan's name", name), ("stage", stage)):
        if not JOB.fullmatch(word):
            raise ValueError(f"{what} is {word!r}; in a job's name only letters, digits, '_', '.' and '-' can stand")
    folder = run / "slurm"
    python, srun_options = _runner(cluster, (run, directory), gpus=cluster.gpus_per_node)
    return _render(
        "stage",
        cluster,
        name=name,
        stage=stage,
        run=run,
        folder=folder,
        script=folder / f"{stage}.sbatch",
        directory=directory,
        nodes=cluster.nodes_of(stage),
        time_limit=cluster.time_of(stage),
        options=_options(cluster, OfVerb()),
        python=python,
        srun_options=srun_options,
    )


def verb_script(verb: Verb, *, name: str, folder: Path, directory: Path, cluster: Cluster) -> str:
    """The text of a verb's job. `folder` (the scripts', beside or in what is written) and `directory` are absolute. ValueError likewise."""
    _check_paths(cluster, folder, directory)
    if not JOB.fullmatch(name):
        raise ValueError(f"the name {name!r} cannot be a job's: only letters, digits, '_', '.' and '-' can stand there")
    asked = cluster.jobs.get(verb.job, OfVerb())  # type: ignore[call-overload]  # a name that no job of ours has is no key
    gpus = cluster.gpus_per_node if verb.whole_run else 0
    python, srun_options = _runner(cluster, (folder.parent, directory), gpus=gpus)
    return _render(
        "verb",
        cluster,
        name=f"{name}-{verb.job}",
        job=verb.job,
        about=verb.about,
        folder=folder,
        script=folder / f"{verb.job}.sbatch",
        directory=directory,
        array=verb.array,
        nodes=nodes_of(verb, cluster),
        ranks=cluster.ranks_per_node if verb.whole_run else 1,
        cpus=cluster.cpus_per_rank if verb.whole_run else cpus_of(verb, cluster),
        gpus=gpus,
        time_limit=asked.time_limit or cluster.time_limit,
        options=_options(cluster, asked),
        python=python,
        srun_options=srun_options,
        commands=[shlex.join(words) for words in verb.commands],
    )


def nodes_of(verb: Verb, cluster: Cluster) -> int:
    """How many the job asks for."""
    asked = cluster.jobs.get(verb.job, OfVerb()).nodes  # type: ignore[call-overload]
    if verb.whole_run:
        return asked or cluster.nodes
    return asked or 1 if verb.job == "convert" else 1


def cpus_of(verb: Verb, cluster: Cluster) -> int:
    """Processors of a node that its only task has."""
    return cluster.jobs.get(verb.job, OfVerb()).cpus or cluster.ranks_per_node * cluster.cpus_per_rank  # type: ignore[call-overload]


def _check_paths(cluster: Cluster, written: Path, directory: Path) -> None:
    for what, path in (("--to", written), ("the folder submit was called in", directory)):
        if not PATH.fullmatch(str(path)):
            raise ValueError(f"{what} is {str(path)!r}; a job's path has letters, digits and _.,:@+=/- only, for #SBATCH quotes nothing")
        if cluster.container is not None and re.search("[,:]", str(path)):
            raise ValueError(f"{what} is {str(path)!r}; inside a container a path has no ',' and no ':', which part mounts from each other")


def _options(cluster: Cluster, asked: OfVerb) -> list[tuple[str, str]]:
    """What #SBATCH lines say beside the sizes."""
    options = {
        "mem": asked.memory or cluster.memory,
        "partition": asked.partition or cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(cluster.exclude) or None,
    }
    return [(option, value) for option, value in options.items() if value is not None]


def _render(template: str, cluster: Cluster, **values: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
        comment_start_string="{%#", comment_end_string="#%}",  # the usual ones are the shell's, as in ${#bad[@]}
    )  # fmt: skip
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    secrets = cluster.secrets()
    shown = sorted((name, value) for name, value in cluster.environment.items() if name not in secrets)
    return environment.get_template(f"{template}.sbatch.j2").render(cluster=cluster, environment=shown, secrets=bool(secrets), **values)


def secrets_script(cluster: Cluster) -> str:
    """What the scripts take the values from that nobody should read; empty where there are none."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(cluster.secrets().items()))


def _runner(cluster: Cluster, always: tuple[Path, ...], *, gpus: int) -> tuple[str, str]:
    """How a rank's interpreter is called, and what srun is told of the container; quoted for the shell."""
    container = cluster.container
    if container is None:
        return shlex.quote(cluster.python), ""
    mounts = [*(f"{path}:{path}" for path in always), *container.mounts]
    if container.kind == "pyxis":
        inside = f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={always[1]}"
        return shlex.quote(cluster.python), "".join(f" {shlex.quote(option)}" for option in inside)
    return shlex.join(_apptainer(cluster, container, mounts, gpus)), ""


def _apptainer(cluster: Cluster, container: Container, mounts: list[str], gpus: int) -> list[str]:
    return ["apptainer", "exec", *(["--nv"] if gpus else []), "--bind", ",".join(mounts), container.image, cluster.python]
