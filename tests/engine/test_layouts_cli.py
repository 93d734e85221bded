"""Layouts through the command line, on the recipe itself: the losses are one rank's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 3


def losses(run: Path, corpus: Path, *options: str) -> list[float]:
    """Of the training steps, then of the validations, on the little corpus; rows of 256 tokens for speed, as many as the recipe has."""
    settings = [f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}", "data.prepare=null", f"steps={STEPS}"]
    settings += ["stages.0.length=256", "stages.0.batch_tokens=1024", "validation.tokens=2048"]
    command = [sys.executable, "-m", "minimax_train.cli", "train", "recipes.tiny:stdlib", "--to", str(run), *options]
    done = subprocess.run([*command, *(word for s in settings for word in ("--set", s))], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line[kind] for kind in ("loss", "validation_loss") for line in lines if kind in line]
    assert len(found) == STEPS + 2
    split = "layout.context=2" in options
    assert all((1 < line["context_imbalance"] < 2) if split else line["context_imbalance"] == 1 for line in lines if "loss" in line)
    return found


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("one") / "run", corpus)


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees",
    [
        (),
        ("tensor=4",),
        ("expert=4",),
        ("tensor=2", "expert=2"),
        ("pipeline=2", "context=2"),
        ("context=2", "expert=4"),
        ("expert=2", "expert_tensor=2"),
        ("tensor=2", "expert=2", "expert_tensor=2"),
    ],
    ids=lambda degrees: " ".join(degrees).replace("=", "") or "data4",  # names that -k takes
)
def test_losses_of_one_rank(corpus: Path, tmp_path: Path, one_rank: list[float], degrees: tuple[str, ...]) -> None:
    settings = [word for degree in degrees for word in ("--set", f"layout.{degree}")]
    assert losses(tmp_path / "run", corpus, "--ranks", "4", *settings) == pytest.approx(one_rank, rel=1e-4)
