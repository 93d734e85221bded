"""The written report: complete, self-contained, honest about what is missing, and never half there."""

import json
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import minimax_train.report.page as page_module
from minimax_train.report.page import write_report

PLOTS = ("loss", "positions", "needle", "experts", "routers", "sources", "throughput", "optimizer", "gradients", "parts")
MakeRun = Callable[..., Path]


class Elements(HTMLParser):
    """Collects tags, the values of attributes that can fetch something, alternative texts and table cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        self.alts += [value or "" for name, value in attrs if name == "alt"]
        if tag in ("td", "th", "dd"):
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th", "dd")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data.strip()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, synthetic: Any) -> Path:
    """The report directory of the complete synthetic run."""
    run = synthetic.write_run(tmp_path_factory.mktemp("complete") / "run")
    page = write_report(run)
    assert page == run / "report" / "index.html"
    return page.parent


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the page's words alone: every picture is one byte (drawing is most of the time)."""
    monkeypatch.setattr(page_module, "png", lambda figure: b"0")


def test_every_plot_is_in_the_page_and_beside_it(report: Path) -> None:
    assert sorted(path.name for path in report.iterdir()) == sorted(["index.html", *(f"{name}.png" for name in PLOTS)])
    text = (report / "index.html").read_text()
    for name in PLOTS:
        assert b64encode((report / f"{name}.png").read_bytes()).decode() in text
    alts = Elements(text).alts
    assert len(alts) == len(PLOTS)
    assert all(len(alt) > 60 for alt in alts)


@pytest.mark.parametrize("name", PLOTS)
def test_no_plot_is_blank(report: Path, name: str) -> None:
    pixels = imread(report / f"{name}.png")[..., :3]
    assert pixels.shape[1] >= 1200
    assert pixels.std() > 0.05
    for half in np.array_split(pixels, 2, axis=0) + np.array_split(pixels, 2, axis=1):
        assert half.std() > 0.03, "half of the plot is blank"


def test_nothing_is_fetched(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = Elements(text)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    outside_plots = re.sub(r"base64,[^\"]*", "", text)
    for word in ("http://", "https://", "url(", "@import", "//cdn"):
        assert word not in outside_plots


def test_tables_show_the_run(report: Path, synthetic: Any) -> None:
    cells = Elements((report / "index.html").read_text()).cells
    lines = synthetic.metrics()
    training = [line for line in lines if "loss" in line]
    final = [line for line in lines if "validation_loss" in line][-1]["validation_loss"]
    seconds = sum(line["step_seconds"] for line in training)
    expected = [f"{final:.3f}nats per token", "5.912nats per token", f"{5.9123 - final:.3f}entropy − validation loss"]
    expected += ["1,146,880of 1,146,880 planned", f"{int(seconds) // 60} min {round(seconds) % 60} svalidation not counted"]
    for name, length, base, batch, steps, _ in synthetic.STAGES:
        mine = [line for line in training if line["stage"] == name]
        last = [line for line in lines if line["stage"] == name and "validation_loss" in line][-1]["validation_loss"]
        mean = batch * steps / sum(line["step_seconds"] for line in mine)
        expected += [name, f"{length:,}", f"{base:,.0f}", f"{steps}", f"{batch * steps:,}", f"{last:.3f}", f"{mean:,.0f}"]
    for stage in synthetic.positions()["stages"]:
        expected += [f"{stage['previous_length']:,} → {stage['length']:,}", f"{stage['tokens']:,}", f"{stage['documents']}"]
        for where in ("inside", "beyond"):
            before, after = stage[where]["before"], stage[where]["after"]
            expected += [f"{before:.3f} → {after:.3f}", f"▼ −{before - after:.3f}"]
    expected += ["unigram entropy", "5.9123", "4,512,345", "2.13.0"]
    assert [value for value in expected if value not in cells] == [], cells


def test_plan_is_shown_folded(report: Path) -> None:
    text = (report / "index.html").read_text()
    assert "hidden: 128" in text[text.index("<details>") : text.index("</details>")]


def test_cpu_and_missing_mfu_are_said(report: Path) -> None:
    text = (report / "index.html").read_text()
    assert "CPU run: it proves the arithmetic, not GPU speed" in text
    assert "MFU (the share of the device&#39;s peak) was not measured." in text
    assert "is missing" not in text
    assert "not evaluated" not in text.lower()


def test_same_run_same_bytes(report: Path) -> None:
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    (report / "stale.png").write_bytes(b"of an older report")
    write_report(report.parent)
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before


def test_missing_files_are_said(make_run: MakeRun) -> None:
    run = make_run()
    (run / "evaluation" / "positions.json").unlink()
    (run / "evaluation" / "needle.json").unlink()
    (run / "run.json").unlink()
    page = write_report(run)
    text = page.read_text()
    assert "not evaluated: run `minimax-train evaluate positions RUN`" in text
    assert "not evaluated: run `minimax-train evaluate needle RUN`" in text
    assert "run.json is missing" in text
    assert "CPU run" not in text
    assert "not measured" in Elements(text).cells[1]  # unigram entropy
    assert not (page.parent / "positions.png").exists()


def test_hostile_names_are_only_text(make_run: MakeRun) -> None:
    run = make_run(names={"8K": "<script>alert(1)</script>", "32K": "$\\frac{1}{$"})
    (run / "run.json").write_text(json.dumps({"device": "</td><img src=x onerror=alert(1)>"}))
    with (run / "plan.yaml").open("a") as plan:
        plan.write("# </pre><script>alert(2)</script>\n")
    text = write_report(run).read_text()
    page = Elements(text)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.cells
    assert "&lt;script&gt;alert(2)" in text
    assert all(address.startswith("data:image/png") for address in page.addresses)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_run_that_has_just_begun(make_run: MakeRun, steps: int) -> None:
    run = make_run()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[1 : 1 + steps]))
    page = write_report(run)
    text = page.read_text()
    assert "Stage 8K has not begun." in text
    assert "No validation line yet" in text
    assert (page.parent / "loss.png").exists() == (steps > 0)
    assert ("no training step yet" in text) == (steps == 0)


@pytest.mark.usefixtures("no_plots")
def test_unfinished_last_line_is_said(make_run: MakeRun) -> None:
    run = make_run()
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[:-30])
    text = write_report(run).read_text()
    number = whole.count(b"\n")
    assert f"The last line of metrics.jsonl (line {number}) was cut short" in text


@pytest.mark.usefixtures("no_plots")
def test_mfu_has_a_column_where_measured(make_run: MakeRun, synthetic: Any) -> None:
    lines = [line | {"mfu": 0.4375} if "loss" in line and line["stage"] == "8K" else line for line in synthetic.metrics()]
    text = write_report(make_run(lines=lines)).read_text()
    assert Elements(text).cells.count("43.8%") == 1
    assert "MFU (the share" not in text


def test_failure_leaves_the_old_report(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    monkeypatch.setattr(page_module, "png", lambda figure: b"0")
    before = write_report(run).read_bytes()
    listing = sorted(path.name for path in run.iterdir())

    def full_disk(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", full_disk)
        write_report(run)
    assert (run / "report" / "index.html").read_bytes() == before

    rename = Path.rename

    def refuse_new(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(Path, "rename", refuse_new)
        write_report(run)
    assert (run / "report" / "index.html").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == listing


def test_pyplot_is_never_imported() -> None:
    code = "import sys, minimax_train.report.page; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
