"""RUN/report/: the page and its plots, written in one piece."""

from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minimax_train.report import words
from minimax_train.report.canvas import png
from minimax_train.report.gradient_plot import gradient_plot
from minimax_train.report.needle_plot import needle_plot
from minimax_train.report.parts_plot import parts_plot
from minimax_train.report.plots import Plot, expert_plot, loss_plot, optimizer_plot, throughput_plot
from minimax_train.report.position_plot import position_plot
from minimax_train.report.record import Record, read_record
from minimax_train.report.router_plot import router_plot
from minimax_train.report.source_plot import source_plot
from minimax_train.report.summary import Summary, notices, summarize


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot as the page needs it: `image` is PNG, None where there is nothing to draw."""

    plot: Plot
    image: bytes | None

    @property
    def base64(self) -> str:
        """The PNG for a data: address."""
        return b64encode(self.image or b"").decode("ascii")


def write_report(run: Path) -> Path:
    """Writes `run`/report/index.html and report/NAME.png (one a plot: loss, experts and so on); returns the page's path.

    On return the directory holds this report and nothing else; until then whatever stood there before. The page is one file: plots are
    in it, nothing is fetched. The same run gives the same bytes. Raises ValueError for a missing or broken file of the run.
    """
    record = read_record(run)
    summary = summarize(record)
    plots = (
        loss_plot(record, summary),
        position_plot(record.name, record.positions),
        needle_plot(record.name, record.needles),
        expert_plot(record),
        router_plot(record),
        source_plot(record),
        parts_plot(record),
        throughput_plot(record, summary),
        optimizer_plot(record),
        gradient_plot(record),
    )
    pictures = [Picture(plot=plot, image=None if plot.figure is None else png(plot.figure)) for plot in plots]
    page = _render(record, summary, pictures)
    target = run / "report"
    with TemporaryDirectory(prefix=".report-", dir=run) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        for picture in pictures:
            if picture.image is not None:
                (new / f"{picture.plot.name}.png").write_bytes(picture.image)
        (new / "index.html").write_text(page, encoding="utf-8")
        _replace(target, new, Path(scratch) / "old")
    return target / "index.html"


def _replace(target: Path, new: Path, old: Path) -> None:
    """`new` takes the place of `target`, which goes to `old`, and comes back if the renaming fails."""
    with suppress(FileNotFoundError):
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _render(record: Record, summary: Summary, pictures: list[Picture]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for word in (words.nats, words.change, words.count, words.brief, words.duration, words.fact):
        environment.filters[word.__name__] = word
    environment.globals["difference"] = words.difference
    absent = [f"{picture.plot.title}: {picture.plot.absent}" for picture in pictures if picture.image is None]
    return environment.get_template("page.html.j2").render(
        record=record,
        summary=summary,
        pictures=[picture for picture in pictures if picture.image is not None],
        notices=[*notices(record, summary), *absent],
        facts=_shown(record.facts or {}),
    )


def _shown(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name.replace("_", " "), value) for name, value in facts.items()]
