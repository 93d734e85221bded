"""metrics.jsonl, TensorBoard and the console: one line of figures a step, the same figures everywhere."""

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from minimax_train.checkpoint.commit import replace_text
from minimax_train.train.folder import RunFolder

SHOWN = {"loss": "loss", "validation_loss": "validation", "lr": "lr", "grad_norm": "grad", "tokens_per_second": "tok/s"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Metrics:
    """Writes one run's figures; made by the first rank only."""

    def __init__(self, folder: RunFolder, *, step: int, total_steps: int, out: TextIO | None = None) -> None:
        """Goes on after `step`: lines of later steps, left by a run that was killed, are redone and therefore dropped."""
        self._folder, self._total, self._out, self._last = folder, total_steps, out or sys.stderr, 0.0
        self._open(step)

    def _open(self, step: int) -> None:
        lines = read_metrics(self._folder.metrics)
        kept = [line for line in lines if line["step"] <= step]
        replace_text(self._folder.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._folder.metrics.open("a")
        self._board = SummaryWriter(str(self._folder.tensorboard), purge_step=step + 1)
        self._bar = tqdm(total=self._total, initial=step, unit="step", file=self._out, disable=None, dynamic_ncols=True)
        self.validated = {line["step"] for line in kept if "validation_loss" in line}
        """Steps already scored."""

    def write(self, figures: dict[str, Any], *, advance: bool = True) -> None:
        """One line, on the disk when this returns; shown on the console, at most one plain line every two seconds."""
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if isinstance(value, (int, float)) and name not in ("step", "stage"):
                self._board.add_scalar(name, value, figures["step"])
        for name, layers in figures.get("router", {}).items():
            for layer, value in enumerate(layers):
                self._board.add_scalar(f"router_{name}/layer_{layer:02}", value, figures["step"])
        for kind in ("sources", "epochs", "grad_norms", "source_loss", "source_gradient", "length_loss", "length_gradient"):
            for source, value in figures.get(kind, {}).items():
                self._board.add_scalar(f"{kind}/{source}", value, figures["step"])
        text = ", ".join(f"{shown} {figures[name]:.4g}" for name, shown in SHOWN.items() if name in figures)
        if not self._bar.disable:
            self._bar.set_description(f"stage {figures['stage']}")
            self._bar.set_postfix_str(text)
            self._bar.update(int(advance))
        elif not advance or time.monotonic() - self._last > 2.0:
            self._last = time.monotonic()
            self.say(f"step {figures['step']} of {self._bar.total}, stage {figures['stage']}: {text}")

    def go_back(self, step: int, number: int) -> Path:
        """Goes on after an earlier `step`: the lines of later steps move to the file returned, in the run's logs."""
        self.close()
        gone = [line for line in read_metrics(self._folder.metrics) if line["step"] > step]
        place = self._folder.logs / f"rewound-{number}-to-step-{step:08d}.jsonl"
        replace_text(place, "".join(json.dumps(line) + "\n" for line in gone))
        self._open(step)
        return place

    def say(self, line: str) -> None:
        """A line that does not disturb the bar."""
        tqdm.write(line, file=self._out)
        self._out.flush()

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()
