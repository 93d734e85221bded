"""Nothing that a plan, a cluster's file or the command line names is ever run, shown where it should not be, or left open to others."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.tokenizer import train_tokenizer
from minimax_train.cli import main
from slurm.cluster import load_cluster
from slurm.script import job_script
from tests.slurm.stubs import calls, execute, stubs
from tests.support import FIXTURE, little_plan

HOSTILE = (
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a\ntouch pwned\n",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "a && touch pwned",
    "| touch pwned",
    "a b",
    "-rf",
    "${IFS}touch${IFS}pwned",
    "x\n#SBATCH --wrap=pwned",
    "{{ 7 * 7 }}",
    "{% include 'begin.j2' %}",
    "$HOME",
    "*",
    "\\",
    "a\\\n touch pwned",
    "ü\u202e",
    "nul\0nul",
)
WORDS = ("partition", "account", "qos", "constraint", "memory", "exclude", "time_limit", "job partition", "name of a variable")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with stand-ins for Slurm's commands on PATH."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{stubs(tmp_path)}:{os.environ['PATH']}")
    monkeypatch.setenv("STUB", str(tmp_path / "stubs"))
    monkeypatch.setattr("slurm.submit.ROOMS", ("recipes",))  # the copy of the code is not what this is about
    return tmp_path


def cluster(place: Path, **fields: Any) -> list[str]:
    known: dict[str, Any] = {"nodes": 2, "ranks_per_node": 2, "preflight": False, "time_limit": "10"}
    (place / "cluster.yaml").write_text(json.dumps({**known, **fields}))
    return ["--cluster", str(place / "cluster.yaml")]


def scripts(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.sbatch"))
    assert found
    for script in found:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and not done.stderr
        lines = script.read_text().split("\nset -uo")[0].splitlines()
        assert all(line.startswith("#") or not line for line in lines) and "--wrap" not in "".join(lines)
    return found


def pwned(place: Path) -> bool:
    return any(path.name == "pwned" for path in place.rglob("*"))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_any_text_arrives_as_it_is(place: Path, capsys: pytest.CaptureFixture[str], hostile: str) -> None:
    """Where the cluster's file holds texts: submitted and run, srun and the rest get the text itself."""
    run, container = place / "run", {"kind": "apptainer", "image": f"image{hostile}", "mounts": [f"mount{hostile}"]}
    environment = {"HOSTILE": hostile, "MY_TOKEN": hostile}
    known = cluster(place, python=hostile, modules=[f"module{hostile}"], environment=environment, container=container)
    status = main(["submit", "recipes.tiny:stdlib", "--to", str(run), *known])
    if "\0" in hostile:
        assert status == 2 and capsys.readouterr().err.count("\n") == 1 and not run.exists()
        return
    assert status == 0
    for script in scripts(run / "slurm"):
        done = execute(script.read_text(), place / "stubs", STUB_TRAIN='printf "%s" "$HOSTILE|$MY_TOKEN" > "$STUB/seen"; exit 2')
        assert done.returncode == 2, done.stderr
    assert not pwned(place)
    assert (place / "stubs" / "seen").read_text() == f"{hostile}|{hostile}"
    told, flat = [word for words in calls(place / "stubs") for word in words], hostile.replace("\n", "~")
    assert {flat, f"image{flat}", f"module{flat}"} <= set(told) and any(word.endswith(f",mount{flat}") for word in told)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_words_are_refused(place: Path, hostile: str) -> None:
    """What stands in a line of #SBATCH: in one line. Two are harmless: a word, and Slurm's own list of all."""
    fields = [{field: hostile} for field in ("partition", "account", "qos", "constraint", "memory", "time_limit")]
    fields += [{"exclude": [hostile]}, {"environment": {hostile: "1"}}, {"jobs": {"prepare": {"partition": hostile}}}]
    for field in fields:
        file = Path(cluster(place, **field)[1])
        if hostile in ("-rf", "*") and not {"environment", "time_limit"} & set(field):
            text = job_script(name="x", stage="y", run=place / "run", directory=place, cluster=load_cluster(file))
            assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=True).stderr == ""
        else:
            with pytest.raises(ValueError, match="cluster.yaml") as refused:
                load_cluster(file)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_and_paths(place: Path, capsys: pytest.CaptureFixture[str], hostile: str) -> None:
    """Of a plan, a stage, and the run's folder: refused, or harmless."""
    known = cluster(place)
    for words in (
        ["--to", str(place / "run"), "--set", f"name={json.dumps(hostile)}"],
        ["--to", str(place / "run"), "--set", f"stages.0.name={json.dumps(hostile)}"],
        ["--to", f"{place}/{hostile}"],
    ):
        status = main(["submit", "recipes.tiny:stdlib", *words, *known])
        error = capsys.readouterr().err
        assert (status == 2 and error.count("\n") == 1) or (status == 0 and hostile == "-rf"), error
        if status == 0:
            scripts(Path(words[1]) / "slurm")
    assert not pwned(place) and not (place / "run").exists()


@pytest.mark.parametrize("hostile", [text for text in HOSTILE if "\0" not in text])
def test_words_of_a_verb(place: Path, hostile: str) -> None:
    """Inputs, and a key, with any name go through to the command as they are."""
    name = hostile.replace("/", "")
    folder = place / "texts" / name
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "one two"}\n')
    (place / "tokenizer.json").write_bytes(train_tokenizer(["one two"], vocabulary=280).content)
    given = ["data", "prepare", str(folder), "--tokenizer", "tokenizer.json", f"--key={hostile}", "--to", "tokens"]
    assert main(["submit", *given, *cluster(place)]) == 0
    for script in scripts(place / "tokens.slurm"):
        assert execute(script.read_text(), place / "stubs").returncode == 0
    told = [words for words in calls(place / "stubs") if words[0] == "srun" and "prepare" in words]
    assert len(told) == 2 and not pwned(place)
    for words in told:
        begin = words.index("data")
        assert words[begin : begin + len(given)] == [word.replace("\n", "~") for word in given]


SECRET = "hunter2-is-not-shown"


def test_secrets_are_not_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They reach the ranks, but stand in no script, no output, no trace of the shell, and only in files for their owner's eyes."""
    names = ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "db_password", "AWS_CREDENTIALS")
    fields = {"nodes": 2, "ranks_per_node": 2, "environment": {**dict.fromkeys(names, SECRET), "TOKENIZERS_PARALLELISM": "false"}}
    (place / "cluster.yaml").write_text(json.dumps(fields))
    words = ["submit", "recipes.tiny:stdlib", "--to", str(place / "run"), "--cluster", "cluster.yaml"]
    assert main([*words, "--dry-run"]) == 0 and main(words) == 0
    folder = place / "run" / "slurm"
    seen = "".join(f'[[ ${name} == {SECRET[:7]}* ]] && echo -n "{name} " >> "$STUB/seen"; ' for name in names)
    done = execute(scripts(folder)[0].read_text(), place / "stubs", trace=True, STUB_TRAIN=f"{seen} exit 2")
    assert (place / "stubs" / "seen").read_text().split() == list(names)
    said = capsys.readouterr()
    assert "export TOKENIZERS_PARALLELISM=false" in said.out
    assert SECRET not in said.out + said.err + done.stdout + done.stderr and "+ step=" in done.stderr
    (place / "stubs" / "script").unlink()
    holding = {path.name for path in place.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()}
    assert holding == {"cluster.yaml", "secrets"}
    for path in (folder / "secrets", folder / "cluster.yaml", folder / "plan.yaml", *folder.glob("*.sbatch")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_modes_stay_private(place: Path) -> None:
    """Also where an older file was open to all."""
    words = ["submit", "recipes.tiny:stdlib", "--to", str(place / "run"), *cluster(place, environment={"MY_TOKEN": "x"})]
    assert main(words) == 0
    (place / "run" / "slurm" / "secrets").chmod(0o666)
    (place / "run" / "slurm" / "jobs.jsonl").unlink()
    assert main(words) == 0
    assert stat.S_IMODE((place / "run" / "slurm" / "secrets").stat().st_mode) == 0o600


def test_no_file_is_everybody_s_to_write(place: Path, corpus: Path) -> None:
    """Whatever the shell allows: a short training, a conversion, token files, and scripts, under umask 0. And none of them keeps or
    prints what the shell's own variables hold."""
    from minimax_train.recipe import as_yaml

    (place / "little.yaml").write_text(as_yaml(little_plan(corpus, steps=2)))
    (place / "tokenizer.json").write_bytes(train_tokenizer(["one two"], vocabulary=280).content)
    (place / "text.txt").write_text("one two")
    known = cluster(place, environment={"MY_TOKEN": "x"})
    (place / "out").mkdir()
    told = [
        ["data", "prepare", "text.txt", "--tokenizer", "tokenizer.json", "--to", "out/tokens"],
        ["convert", "from-hf", str(FIXTURE), "--to", "out/weights"],
        ["submit", "recipes.tiny:stdlib", "--to", "out/submitted", *known],
        ["train", "little.yaml", "--to", "out/run"],
    ]
    program = f"import os; os.umask(0); from minimax_train.cli import main; raise SystemExit(sum(main(words) for words in {told!r}))"
    own = {**os.environ, "HF_TOKEN": SECRET, "OTHER": SECRET}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=place, env=own)
    assert done.returncode == 0 and SECRET not in done.stdout + done.stderr, done.stderr
    script = (place / "out" / "submitted" / "slurm" / "2K.sbatch").read_text()
    execute(f"umask 0\n{script}", place / "stubs", STUB_TRAIN="exit 2")
    written = [path for path in (place / "out").rglob("*") if not path.is_symlink()]
    assert not [path for path in written if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert len(written) > 40 and [str(path) for path in written if path.stat().st_mode & stat.S_IWOTH] == []
