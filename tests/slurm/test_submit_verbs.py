"""`submit` of data prepare, convert and evaluate: what is refused before anything is written, and what the scripts say."""

import json
import re
from pathlib import Path

import pytest

from data.tokenizer import train_tokenizer
from minimax_train.cli import main
from tests.support import FIXTURE

HOME = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Texts, a tokenizer, a cluster's file of two nodes."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one two three")
    (tmp_path / "tokenizer.json").write_bytes(train_tokenizer(["one two three"], vocabulary=280).content)
    (tmp_path / "cluster.yaml").write_text(json.dumps({"nodes": 2, "ranks_per_node": 2, "cpus_per_rank": 3}))
    return tmp_path


def words(place: Path, text: str) -> list[str]:
    """Split at spaces, with {} for the folder."""
    return ["submit", *text.replace("{}", str(place)).split(), "--cluster", str(place / "cluster.yaml")]


PREPARE = "data prepare {}/texts --tokenizer {}/tokenizer.json --to {}/tokens"


def test_data_prepare(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An array of parts, and a job that puts them together; the words go on as they were typed."""
    assert main([*words(place, PREPARE + " --key body --skip-bad"), "--tasks", "5", "--dry-run"]) == 0
    parts, merge = re.split(r"(?m)^# /.*/merge.sbatch\n", capsys.readouterr().out)
    same = f"data prepare {place}/texts --tokenizer {place}/tokenizer.json --to {place}/tokens --key body --skip-bad"
    assert f'{same} --workers 6 --part "$SLURM_ARRAY_TASK_ID/5" || exit' in parts and "#SBATCH --array=1-5\n" in parts
    assert f"{same} --parts 5 --workers 6 || exit" in merge and "data verify" in merge and "--array" not in merge
    assert sorted(path.name for path in place.iterdir()) == ["cluster.yaml", "texts", "tokenizer.json"]
    assert main([*words(place, PREPARE + " --workers 4"), "--dry-run"]) == 0
    assert '--workers 4 --part "$SLURM_ARRAY_TASK_ID/1"' in capsys.readouterr().out  # little input: one task


def test_convert_and_evaluate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = {"nodes": 2, "ranks_per_node": 2, "jobs": {"convert": {"nodes": 3, "partition": "fat", "cpus": 9, "time_limit": "5"}}}
    (place / "cluster.yaml").write_text(json.dumps(cluster))
    assert main([*words(place, f"convert from-hf {FIXTURE} --to {{}}/weights --layout tensor=2"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"# {place}/weights.slurm/convert.sbatch\n") and f"--to {place}/weights --layout tensor=2 --workers 9" in said
    assert all(f"#SBATCH --{option}\n" in said for option in ("nodes=3", "ntasks-per-node=1", "cpus-per-task=9", "partition=fat", "time=5"))
    assert main(["convert", "from-hf", str(FIXTURE), "--to", str(place / "weights")]) == 0
    assert main([*words(place, "evaluate needle {}/weights --to {}/judged --tasks single --set layout.context=2"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"# {place}/judged/slurm/evaluate/evaluate.sbatch\n" in said and "#SBATCH --ntasks-per-node=2\n" in said
    assert f"evaluate needle {place}/weights --to {place}/judged --tasks single --set layout.context=2 || exit" in said
    assert main([*words(place, "convert to-hf {}/weights --to {}/hf"), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("data prepare {}/none --tokenizer {}/tokenizer.json --to {}/tokens", "no such file or directory"),
        ("data prepare {}/texts --tokenizer {}/none --to {}/tokens", "none"),
        ("data prepare {}/texts --tokenizer {}/tokenizer.json --to {}/texts/tokens", "inside the input directory"),
        (PREPARE + " --eod <x>", "<x>"),
        (PREPARE + " --tasks 0", "--tasks is 0"),
        (PREPARE + " --tasks 99999", "K/N"),
        (PREPARE + " --part 1/2", "--tasks N"),
        ("data prepare {}/texts --tokenizer {}/tokenizer.json --to {}/a$b", "quotes nothing"),
        ("convert from-hf {}/texts --to {}/weights", "config.json"),
        (f"convert from-hf {FIXTURE} --to {{}}/texts", "already exists"),
        (f"convert from-hf {FIXTURE} --to {{}}/w --layout tensor=3", "tensor"),
        (f"convert from-hf {FIXTURE} --to {{}}/w --layout tensr=3", "layout"),
        ("convert to-hf {}/texts --to {}/hf", "nor a checkpoint"),
        ("convert to-hf {}/texts --to {}/hf --tokenizer {}/none", "no such file"),
        ("convert verify {}/texts", "config.json"),
        ("evaluate needle {}/texts --to {}/e", "nor a checkpoint"),
        ("evaluate needle {}/texts", "say --to FOLDER"),
        ("evaluate needle {}/texts --to {}/e --lengths x", "lengths"),
        ("evaluate needle {}/texts --to {}/e --set layout.context=3", "context"),
        ("evaluate needle {}/texts --to {}/e --device cuda", "gpus_per_node"),
        ("evaluate needle {}/texts --to {}/e --ranks 2", "--ranks"),
        ("evaluate positions {}/texts", "is not a run"),
    ],
)
def test_refused_before_anything_is_written(place: Path, capsys: pytest.CaptureFixture[str], typed: str, says: str) -> None:
    """One line and status 2, though there is no Slurm here to ask."""
    before = sorted(place.rglob("*"))
    assert main(words(place, typed)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("typed", ["data", "data inspect x", "convert plan tiny", "evaluate", "data prepare --to x", "convert to-hf a b"])
def test_no_verb_of_submit(place: Path, capsys: pytest.CaptureFixture[str], typed: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words(place, typed))
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["submit", "data", "--help"])
    assert ended.value.code == 0 and "--tasks N" in capsys.readouterr().out


def test_without_slurm(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(place))
    assert main(words(place, PREPARE)) == 2
    assert "sbatch is not on PATH" in capsys.readouterr().err and not (place / "tokens.slurm").exists()
