"""The routers' figures, from sums over tokens to metrics.jsonl and TensorBoard."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minimax_train.engine.routing_report import RoutingReport
from minimax_train.train.figures import routing_figures
from minimax_train.train.folder import RunFolder
from minimax_train.train.metrics import Metrics

SUMS = torch.tensor([[10, 10, 10, 10, 40, 20 * math.log(4)], [40, 0, 0, 0, 10, 0.0]], dtype=torch.float64)
"""Two layers of four experts, 20 tokens that choose two: one in balance that knows nothing, one all on one expert with room for ten."""


def test_figures_by_layer() -> None:
    report = RoutingReport.of(SUMS, 2)
    assert report.share == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]
    assert report.entropy == pytest.approx([math.log(4), 0.0])
    assert report.load_entropy == pytest.approx([math.log(4), 0.0])
    assert report.largest_load == [1.0, 4.0]
    assert report.dropped == [0.0, 0.75]


def test_one_line_and_a_curve_per_layer(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    metrics = Metrics(folder, step=0, total_steps=1, out=io.StringIO())
    metrics.write({"step": 1, "stage": "64", "loss": 2.0} | routing_figures(RoutingReport.of(SUMS, 2)))
    metrics.close()
    line = json.loads(folder.metrics.read_text())
    assert line["expert_load_max"] == 4.0
    assert line["router_entropy"] == pytest.approx(math.log(4) / 2)
    assert line["dropped_fraction"] == 0.375
    even = round(math.log(4), 5)
    assert line["router"] == {"entropy": [even, 0.0], "load_entropy": [even, 0.0], "load_max": [1.0, 4.0], "dropped": [0.0, 0.75]}
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    assert board.Scalars("router_dropped/layer_01")[0].value == 0.75
    assert board.Scalars("dropped_fraction")[0].value == 0.375
