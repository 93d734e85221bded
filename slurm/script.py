"""A stage's job script, from templates/stage.sbatch.j2: the same input gives the same text."""

import re
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slurm.cluster import Cluster, Container

PATH = re.compile(r"/[A-Za-z0-9_.,:@+=/-]+")
JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def job_script(*, name: str, stage: str, run: Path, directory: Path, cluster: Cluster) -> str:
    """The text of the job of `stage`. `run` and `directory` (where relative paths of the plan begin) are absolute.

    ValueError where a name or a path cannot stand in a line of #SBATCH.
    """
    for what, path in (("--to", run), ("the folder submit was called in", directory)):
        if not PATH.fullmatch(str(path)):
            raise ValueError(f"{what} is {str(path)!r}; a job's path has letters, digits and _.,:@+=/- only, for #SBATCH quotes nothing")
    for what, word in (("the plan's name", name), ("stage", stage)):
        if not JOB.fullmatch(word):
            raise ValueError(f"{what} is {word!r}; in a job's name only letters, digits, '_', '.' and '-' can stand")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    folder = run / "slurm"
    options = {"mem": cluster.memory, "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    options |= {"constraint": cluster.constraint, "exclude": ",".join(cluster.exclude) or None}
    python, srun_options = _runner(cluster, (run, directory))
    return environment.get_template("stage.sbatch.j2").render(
        name=name,
        stage=stage,
        run=run,
        folder=folder,
        script=folder / f"{stage}.sbatch",
        directory=directory,
        cluster=cluster,
        nodes=cluster.nodes_of(stage),
        time_limit=cluster.time_of(stage),
        options=[(option, value) for option, value in options.items() if value is not None],
        environment=sorted(cluster.environment.items()),
        python=python,
        srun_options=srun_options,
    )


def _runner(cluster: Cluster, always: tuple[Path, ...]) -> tuple[str, str]:
    """How a rank's interpreter is called, and what srun is told of the container; quoted for the shell."""
    container = cluster.container
    if container is None:
        return shlex.quote(cluster.python), ""
    mounts = [*(f"{path}:{path}" for path in always), *container.mounts]
    if container.kind == "pyxis":
        inside = f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={always[1]}"
        return shlex.quote(cluster.python), "".join(f" {shlex.quote(option)}" for option in inside)
    return shlex.join(_apptainer(cluster, container, mounts)), ""


def _apptainer(cluster: Cluster, container: Container, mounts: list[str]) -> list[str]:
    return ["apptainer", "exec", *(["--nv"] if cluster.gpus_per_node else []), "--bind", ",".join(mounts), container.image, cluster.python]
