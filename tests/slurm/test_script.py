"""Job scripts as they were last reviewed; what a cluster's file may say, and that nothing in it is run by the shell."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from minimax_train.cli import main
from minimax_train.recipe import load_plan
from slurm.cluster import Cluster, Container, OfStage, OfVerb, load_cluster
from slurm.script import Verb, job_script, nodes_of, verb_script

HERE, HOME = Path(__file__).parent, Path(__file__).parents[2]
CHAINS = {"cpu": "recipes.tiny:stdlib", "h800": "recipes.ladder:hybrid_7b"}
SCRIPTS = [(cluster, stage.name) for cluster, recipe in CHAINS.items() for stage in load_plan(recipe).stages]


def script(cluster: Cluster, name: str = "tiny-stdlib", stage: str = "2K", run: str = "/shared/runs/mine") -> str:
    return job_script(name=name, stage=stage, run=Path(run), directory=Path("/shared/minimax-train"), cluster=cluster)


@pytest.mark.parametrize(("cluster", "stage"), SCRIPTS)
def test_as_reviewed(cluster: str, stage: str) -> None:
    """A change of any line shows here. Meant? Write the new text to tests/slurm/golden, and review it."""
    text = script(load_cluster(HOME / "slurm" / "clusters" / f"{cluster}.yaml"), name=load_plan(CHAINS[cluster]).name, stage=stage)
    assert text == (HERE / "golden" / f"{cluster}-{stage}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""


def preparing(*words: str) -> tuple[str, ...]:
    return ("data", "prepare", "/texts/a b", "--tokenizer", "T", "--to", "/tokens/corpus", *words)


VERBS = (
    Verb(job="prepare", about="One part of the token files a task", commands=(preparing("--workers", "4"),), array=8),
    Verb(
        job="merge",
        about="The parts of the token files put together and verified",
        commands=(preparing("--parts", "8"), ("data", "verify", "/tokens/corpus", "--tokenizer", "T")),
    ),
    Verb(job="convert", about="convert to-hf", commands=(("convert", "to-hf", "/shared/runs/mine", "--to", "/shared/hf"),)),
    Verb(job="evaluate", about="evaluate needle", commands=(("evaluate", "needle", "/shared/runs/mine"),), whole_run=True),
)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.job)
@pytest.mark.parametrize("cluster", CHAINS)
def test_verbs_as_reviewed(cluster: str, verb: Verb) -> None:
    """The same for jobs of other verbs."""
    known = load_cluster(HOME / "slurm" / "clusters" / f"{cluster}.yaml")
    text = verb_script(verb, name="corpus", folder=Path("/tokens/corpus.slurm"), directory=Path("/shared/minimax-train"), cluster=known)
    assert text == (HERE / "golden" / f"{cluster}-{verb.job}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""


def test_no_golden_file_too_many() -> None:
    verbs = {f"{cluster}-{verb.job}" for cluster in CHAINS for verb in VERBS}
    assert {path.stem for path in (HERE / "golden").iterdir()} == verbs | {f"{cluster}-{stage}" for cluster, stage in SCRIPTS}


CPU = load_cluster(HOME / "slurm" / "clusters" / "cpu.yaml")
HOSTILE = "$(touch pwned) `touch pwned` '; touch pwned; #\" \\"


def test_nothing_is_run_by_the_shell(tmp_path: Path) -> None:
    """Values with everything a shell reacts to arrive as they are."""
    cluster = replace(CPU, environment={"HOSTILE": HOSTILE}, python=HOSTILE, modules=(HOSTILE,))
    text = script(cluster)
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("module load"))
    end = next(i for i, line in enumerate(lines) if line.startswith("export PYTHONPATH"))
    told = "module() { printf '%s\\0' \"$2\"; }\n" + "\n".join(lines[begin:end]) + "\n"
    told += next(line for line in lines if line.startswith("python=")) + '\nprintf \'%s\\0\' "$HOSTILE" "${python[@]}"\n'
    done = subprocess.run(["bash", "-c", told], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [HOSTILE] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_containers(kind: str) -> None:
    """The run's folder and the project's are seen inside; odd names are quoted."""
    cluster = replace(CPU, container=Container(kind=kind, image="/images/a b.sif", mounts=("/tokens:/tokens",)))  # type: ignore[arg-type]
    text = script(cluster)
    mounts = "/shared/runs/mine:/shared/runs/mine,/shared/minimax-train:/shared/minimax-train,/tokens:/tokens"
    if kind == "pyxis":
        assert text.count("'--container-image=/images/a b.sif'") == text.count(f"--container-mounts={mounts}") == text.count("srun --")
    else:
        assert f"python=(apptainer exec --bind {mounts} '/images/a b.sif' .venv/bin/python)" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, "partition is"),
        ({"exclude": ["n1 n2"]}, "exclude is"),
        ({"gpus_per_node": 4}, "every GPU takes one rank"),
        ({"environment": {"A B": "1"}}, "no name of a variable"),
        ({"time_limit": "tomorrow"}, "time_limit is 'tomorrow'"),
        ({"stages": {"2K": {"nodes": 0}}}, "nodes is 0"),
        ({"node": 3}, "its fields: nodes"),
        ({"jobs": {"merge": {"nodes": 2}}}, "say --tasks N"),
        ({"jobs": {"convert": {"nodes": 0}}}, "jobs.convert.nodes is 0"),
        ({"jobs": {"convert": {"cpus": 0}}}, "jobs.convert.cpus is 0"),
        ({"jobs": {"evaluate": {"time_limit": "soon"}}}, "jobs.evaluate.time_limit is 'soon'"),
        ({"jobs": {"train": {}}}, "jobs.train"),
        ({"least_gb_per_s": -1.0}, "least_gb_per_s is -1"),
        ({"collectives_seconds": 0}, "collectives_seconds is 0"),
        ({"nodes": "2"}, "nodes: "),
        ({"container": {"kind": "docker", "image": "x"}}, "container.kind"),
    ],
)
def test_bad_clusters(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], says: str) -> None:
    """One line, exit 2, nothing written."""
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps({"nodes": 2, "ranks_per_node": 2, **changes}))
    run = tmp_path / "run"
    assert main(["submit", "recipes.tiny:stdlib", "--to", str(run), "--cluster", str(file), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "cluster.yaml" in error
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "/tmp/a b"], "quotes nothing"),
        (["--to", "/tmp/x", "--set", "name=a b"], "the plan's name"),
        (["--to", "/tmp/x", "--set", "stages.0.name=a;b"], "a name has letters"),
        (["--to", "/tmp/x", "--cluster", "/nowhere.yaml"], "no such file"),
        (["--to", "/tmp/x", "--set", "stages.0.batch_tokens=2048"], "do not divide"),
    ],
)
def test_bad_submissions(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    known = [] if "--cluster" in arguments else ["--cluster", str(HOME / "slurm" / "clusters" / "cpu.yaml")]
    assert main(["submit", "recipes.tiny:stdlib", *arguments, *known, "--dry-run"]) == 2
    assert says in capsys.readouterr().err


def test_what_a_stage_asks_for_instead() -> None:
    cluster = replace(CPU, stages={"8K": OfStage(nodes=4, time_limit="5")})
    assert "--nodes=4" in script(cluster, stage="8K") and "--time=5" in script(cluster, stage="8K")
    assert "--nodes=2" in script(cluster) and cluster.ranks_of("8K") == 8


def test_how_many_nodes_a_verb_gets() -> None:
    """Loss by position is computed on one rank, whatever needles have."""
    cluster = replace(CPU, jobs={"evaluate": OfVerb(nodes=3), "convert": OfVerb(nodes=4)})
    prepare, _, convert, needle = VERBS
    assert [nodes_of(verb, cluster) for verb in (prepare, convert, needle, replace(needle, whole_run=False))] == [1, 4, 3, 1]
    assert [nodes_of(verb, CPU) for verb in (prepare, convert, needle)] == [1, 1, 2]
