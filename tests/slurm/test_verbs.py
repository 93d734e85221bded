"""Jobs of verbs other than `train` on real Slurm daemons, and what Slurm is asked before they are submitted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.dataset import verify
from data.format import file_of
from data.prepare import prepare
from data.tokenizer import train_tokenizer
from minimax_train.cli import main
from slurm.submit import recorded
from tests.slurm.daemons import Slurm, machine
from tests.support import FIXTURE

pytestmark = pytest.mark.timeout(240)
HOME = Path(__file__).parents[2]


def submit(slurm: Slurm, *words: str, status: int = 0) -> str:
    """What `submit` says, on standard output where it does, else on standard error."""
    command = [sys.executable, "-m", "minimax_train.cli", "submit", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=slurm.environment, cwd=HOME)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def log(folder: Path) -> str:
    """For a failed assertion."""
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted((folder / "logs").glob("*")))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Texts in 12 files and a tokenizer."""
    texts = [f"text number {number}, and some words of it" for number in range(12)]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    (tmp_path / "tokenizer.json").write_bytes(train_tokenizer(texts, vocabulary=300).content)
    return tmp_path


def preparing(place: Path, cluster: Path) -> list[str]:
    words = ["data", "prepare", *(str(place / "texts" / f"{n:02}.txt") for n in range(12)), "--to", str(place / "tokens")]
    return [*words, "--tokenizer", str(place / "tokenizer.json"), "--cluster", str(cluster), "--tasks", "3"]


def test_data_prepare(slurm: Slurm, place: Path) -> None:
    """Three tasks of an array and what puts their parts together: the bytes of one call. Every input argument is a slice of its own."""
    submit(slurm, *preparing(place, machine(place)))
    folder = place / "tokens.slurm"
    parts, merge = (job["job"] for job in recorded(folder))
    assert slurm.ended(merge) == "COMPLETED", log(folder)
    assert slurm.job(parts)["JobState"] == "COMPLETED"
    told = [path.read_text() for path in folder.glob("logs/prepare-*.log")]
    assert len(told) == 3 and all(": 4 shards, 4 documents" in text for text in told), log(folder)
    dataset = verify(place / "tokens")
    whole = prepare([place / "texts" / f"{n:02}.txt" for n in range(12)], dataset.tokenizer(), place / "one", quiet=True)
    assert all(file_of(place / "one", suffix).read_bytes() == file_of(place / "tokens", suffix).read_bytes() for suffix in whole.files)
    assert "stands there already" in submit(slurm, *preparing(place, machine(place)), status=2)


def test_a_failed_task_stops_the_chain(slurm: Slurm, place: Path) -> None:
    """A text of the third task is not UTF-8: what would put the parts together is cancelled."""
    (place / "texts" / "05.txt").write_bytes(b"\xff\xfe\xfd")
    submit(slurm, *preparing(place, machine(place)))
    merge = recorded(place / "tokens.slurm")[1]["job"]
    assert slurm.ended(merge) == "CANCELLED", log(place / "tokens.slurm")
    assert "05.txt" in log(place / "tokens.slurm") and not (place / "tokens.json").exists()


def test_convert(slurm: Slurm, place: Path) -> None:
    """A Hugging Face folder to a checkpoint, by a process on each of two nodes."""
    weights, cluster = place / "weights", machine(place, account="any", jobs={"convert": {"nodes": 2}})  # no accounting: not refused
    submit(slurm, "convert", "from-hf", str(FIXTURE), "--to", str(weights), "--cluster", str(cluster))
    job = recorded(place / "weights.slurm")[-1]["job"]
    assert slurm.ended(job) == "COMPLETED" and slurm.job(job)["NumNodes"] == "2", log(place / "weights.slurm")
    assert (weights / "checkpoint.json").exists()


def test_evaluate(slurm: Slurm, place: Path) -> None:
    """Needles in a checkpoint, on two nodes with a rank each."""
    weights, judged = place / "weights", place / "judged"
    assert main(["convert", "from-hf", str(FIXTURE), "--to", str(weights)]) == 0
    asked = ["--to", str(judged), "--tokenizer", str(place / "tokenizer.json"), "--lengths", "300", "--depths", "1"]
    asked += ["--tasks", "single", "--samples", "1", "--set", "layout.context=2", "--cluster", str(machine(place, ranks_per_node=1))]
    submit(slurm, "evaluate", "needle", str(weights), *asked)
    folder = judged / "slurm" / "evaluate"
    assert slurm.ended(recorded(folder)[-1]["job"]) == "COMPLETED", log(folder)
    assert json.loads((judged / "needle.json").read_text())["cells"]


def test_no_such_partition(slurm: Slurm, place: Path) -> None:
    """Named before anything is written."""
    error = submit(slurm, *preparing(place, machine(place, partition="gold")), status=2)
    assert "partition 'gold' is not one of this Slurm's: batch" in error and error.count("\n") == 1
    error = submit(slurm, *preparing(place, machine(place, jobs={"merge": {"partition": "silver"}})), status=2)
    assert "partition 'silver'" in error and not (place / "tokens.slurm").exists()
