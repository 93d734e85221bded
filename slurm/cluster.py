"""A cluster as a YAML file says it: how many nodes, what of them a job asks for, and what is set before training begins."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

WORD = re.compile(r"[A-Za-z0-9_.,:@/+=\[\]&|*-]+")
"""What may stand in an #SBATCH line, which the shell does not read and nothing can quote."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LIMIT = re.compile(r"(\d+-)?\d{1,4}(:\d{2}){0,2}", re.ASCII)
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(_|$)", re.IGNORECASE)
"""In a variable's name: its value is put into no script and shown by no trace."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """Where the ranks run. pyxis: srun's own --container-image; apptainer: `apptainer exec`. Slurm's commands stay outside."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    kind: Literal["pyxis", "apptainer"]
    image: str
    """pyxis: a .sqsh file or a registry's name; apptainer: a .sif file."""
    mounts: tuple[str, ...] = ()
    """HOST:INSIDE. The run's folder and the project's are always there, under their own names."""


@dataclass(frozen=True, kw_only=True)
class OfStage:
    """What one stage asks for instead."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    nodes: int | None = None
    time_limit: str | None = None


@dataclass(frozen=True, kw_only=True)
class OfVerb:
    """What the job of a verb other than `train` asks for instead."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    nodes: int | None = None
    """convert: one unless said, each with its processes; evaluate: the run's, for needles; prepare and merge: one each."""
    cpus: int | None = None
    """Of a node; null: those of its ranks."""
    memory: str | None = None
    partition: str | None = None
    time_limit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What every job of a run asks for."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    nodes: int
    ranks_per_node: int
    """One rank a GPU; on a CPU cluster, ranks of one process each."""
    gpus_per_node: int = 0
    cpus_per_rank: int = 1
    memory: str | None = None
    """Of a node, as --mem takes it; null: the partition's default."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: tuple[str, ...] = ()
    """Nodes that no job runs on."""
    time_limit: str = "24:00:00"
    signal_seconds: int = 600
    """So long before the time limit the run is asked to save and stop. Slurm may be a minute early: allow for a save and 60 s."""
    most_stalled: int = 3
    """Attempts in a row that may end with no newer checkpoint; one more ends the chain."""
    preflight: bool = True
    free_gib: int = 10
    """Free space that preflight wants where the run writes."""
    collectives: bool = True
    """Preflight also lets all ranks talk to each other before the stage begins."""
    collectives_seconds: int = 120
    """How long that may take, once the ranks have started."""
    least_gb_per_s: float | None = None
    """Bandwidth below which the largest all-reduce counts as failed; null: any is good."""
    python: str = "python"
    """The interpreter that has the project's packages; inside the container, where there is one."""
    modules: tuple[str, ...] = ()
    """For `module load`, on the node."""
    environment: dict[str, str] = field(default_factory=dict)
    """Exported before anything runs: NCCL's and InfiniBand's settings among them."""
    container: Container | None = None
    stages: dict[str, OfStage] = field(default_factory=dict)
    jobs: dict[Literal["prepare", "merge", "convert", "evaluate"], OfVerb] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {
            name: getattr(self, name) for name in ("nodes", "ranks_per_node", "cpus_per_rank", "signal_seconds", "collectives_seconds")
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("gpus_per_node", "most_stalled", "free_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.gpus_per_node not in (0, self.ranks_per_node):
            raise ValueError(f"ranks_per_node is {self.ranks_per_node}, gpus_per_node {self.gpus_per_node}: every GPU takes one rank")
        for name in ("memory", "partition", "account", "qos", "constraint"):
            _check_word(name, getattr(self, name))
        for node in self.exclude:
            _check_word("exclude", node)
        if "\0" in "".join([self.python, *self.modules, *self.environment.values(), *_texts(self.container)]):
            raise ValueError("python, modules, environment and container are texts for a shell, which has no character of code 0")
        for name in self.environment:
            if not NAME.fullmatch(name):
                raise ValueError(f"environment: {name!r} is no name of a variable: letters, digits and '_', not a digit first")
        if self.least_gb_per_s is not None and not 0 <= self.least_gb_per_s < float("inf"):
            raise ValueError(f"least_gb_per_s is {self.least_gb_per_s}; it must be a number from 0 on")
        for verb, asked in self.jobs.items():
            _check_word(f"jobs.{verb}.partition", asked.partition)
            _check_word(f"jobs.{verb}.memory", asked.memory)
            if verb in ("prepare", "merge") and asked.nodes is not None:
                raise ValueError(f"jobs.{verb}.nodes is {asked.nodes}; each of these jobs has one node: leave it out, and say --tasks N")
            if asked.cpus is not None and asked.cpus < 1:
                raise ValueError(f"jobs.{verb}.cpus is {asked.cpus}; it must be at least 1")
        self._check_time_and_nodes()

    def _check_time_and_nodes(self) -> None:
        asked: dict[str, OfStage | OfVerb] = {"": OfStage(time_limit=self.time_limit, nodes=self.nodes)}
        asked |= {f"stages.{stage}.": own for stage, own in self.stages.items()} | {f"jobs.{verb}.": own for verb, own in self.jobs.items()}
        for where, own in asked.items():
            if own.time_limit is not None and not LIMIT.fullmatch(own.time_limit):
                raise ValueError(f"{where}time_limit is {own.time_limit!r}; write minutes, HH:MM:SS or D-HH:MM:SS")
            if own.nodes is not None and own.nodes < 1:
                raise ValueError(f"{where}nodes is {own.nodes}; it must be at least 1")

    def nodes_of(self, stage: str) -> int:
        return self.stages.get(stage, OfStage()).nodes or self.nodes

    def time_of(self, stage: str) -> str:
        return self.stages.get(stage, OfStage()).time_limit or self.time_limit

    def ranks_of(self, stage: str) -> int:
        return self.nodes_of(stage) * self.ranks_per_node

    def secrets(self) -> dict[str, str]:
        """Variables whose names say that nobody should read them."""
        return {name: value for name, value in self.environment.items() if SECRET.search(name)}

    def partitions(self) -> set[str]:
        """Every one that some job asks for."""
        return {name for name in (self.partition, *(verb.partition for verb in self.jobs.values())) if name is not None}


def _texts(container: Container | None) -> list[str]:
    return [] if container is None else [container.image, *container.mounts]


def _check_word(name: str, value: str | None) -> None:
    if value is not None and not WORD.fullmatch(value):
        raise ValueError(f"{name} is {value!r}; in a line of #SBATCH only letters, digits and _.,:@/+=[]&|*- can stand")


def load_cluster(path: Path) -> Cluster:
    """The cluster of a YAML file. ValueError, in one line, naming the file and the field."""
    if not path.is_file():
        raise ValueError(f"--cluster {path}: no such file; slurm/clusters has examples")
    try:
        tree: Any = YAML(typ="safe", pure=True).load(path)
        return TypeAdapter(Cluster).validate_json(json.dumps(tree))
    except ValidationError as error:
        said = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}".removeprefix(": ") for item in error.errors()
        ]
        known = ", ".join(one.name for one in fields(Cluster))
        raise ValueError(f"--cluster {path}: {'; '.join(said)} (its fields: {known})") from None
    except (YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"--cluster {path} is not YAML of a cluster: {' '.join(str(error).split())}") from None
