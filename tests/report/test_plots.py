"""What is drawn: the marks a reader relies on are in the figures, at the right places."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from minimax_train.report.canvas import fit, png, smooth, window_for
from minimax_train.report.gradient_plot import gradient_plot
from minimax_train.report.needle_plot import needle_plot
from minimax_train.report.needles import read_needles
from minimax_train.report.parts_plot import parts_plot
from minimax_train.report.plots import expert_plot, loss_plot, optimizer_plot, throughput_plot
from minimax_train.report.position_plot import position_plot
from minimax_train.report.record import Record, read_record
from minimax_train.report.router_plot import router_plot
from minimax_train.report.source_plot import source_plot
from minimax_train.report.summary import summarize
from minimax_train.report.words import binary, brief, change, decimal, duration, nats

MakeRun = Callable[..., Path]


def _axes(figure: Figure | None) -> list[Any]:
    assert figure is not None
    return figure.axes


def _line(axes: Any, label: str) -> Any:
    return next(line for line in axes.lines if str(line.get_label()).startswith(label))


@pytest.fixture
def record(make_run: MakeRun) -> Record:
    return read_record(make_run())


def test_loss_plot_shows_stages_entropy_and_validation(record: Record) -> None:
    (axes,) = _axes(loss_plot(record, summarize(record)).figure)
    assert [text.get_text() for text in axes.texts] == ["2K\nlength 2,048", "8K\nlength 8,192", "32K\nlength 32,768"]
    assert [(band.get_x(), band.get_x() + band.get_width()) for band in axes.patches] == [record.span(stage) for stage in range(3)]
    entropy = _line(axes, "unigram entropy")
    assert set(entropy.get_ydata()) == {5.9123}
    assert entropy.is_dashed()
    assert np.array_equal(_line(axes, "validation").get_ydata(), record.validation.loss)
    assert axes.get_xlim() == (0, 1_146_880)
    assert not any(line.get_marker() == "x" for line in axes.lines)


def test_non_finite_losses_are_marked_at_their_tokens(make_run: MakeRun, synthetic: Any) -> None:
    lines = synthetic.metrics()
    bad = [line for line in lines if "loss" in line][10:12]
    bad[0]["loss"], bad[1]["loss"], bad[1]["grad_norm"] = float("nan"), float("inf"), float("nan")
    run = make_run(lines=lines)
    assert "NaN" in (run / "metrics.jsonl").read_text()
    record = read_record(run)
    plot = loss_plot(record, summarize(record))
    mark = _line(_axes(plot.figure)[0], "training loss not finite (2)")
    assert mark.get_marker() == "x"
    assert mark.get_xdata().tolist() == [line["tokens"] for line in bad]
    assert _line(_axes(optimizer_plot(record).figure)[0], "gradient norm not finite (1)").get_xdata().tolist() == [bad[1]["tokens"]]
    assert plot.figure is not None
    assert png(plot.figure).startswith(b"\x89PNG")


def test_run_without_one_finite_value_is_still_drawn(make_run: MakeRun, synthetic: Any) -> None:
    never = dict.fromkeys(("loss", "grad_norm", "lr", "tokens_per_second", "expert_load_max", "validation_loss"), float("nan"))
    lines = [line | {key: value for key, value in never.items() if key in line} for line in synthetic.metrics()]
    for line in lines:
        if "expert_load" in line:
            line["expert_load"] = [[float("nan")] * 4] * 2
    record = read_record(make_run(lines=lines))
    summary = summarize(record)
    for plot in (loss_plot(record, summary), expert_plot(record), throughput_plot(record, summary), optimizer_plot(record)):
        assert plot.figure is not None
        assert png(plot.figure).startswith(b"\x89PNG")


def test_source_plot_shows_shares_and_tokens(record: Record) -> None:
    """Areas that fill the whole height, whose share of long documents rises from none to a half; lines that end at the last figures."""
    plot = source_plot(record)
    shares, taken, packing = _axes(plot.figure)
    short, long = (next(p for p in shares.patches if p.get_label() == name).get_data() for name in ("short", "long"))
    assert (short.values >= 0).all()
    assert np.allclose(long.values, 1)
    assert np.array_equal(short.values, long.baseline)
    assert short.values[0] == 1
    assert short.values[-1] == pytest.approx(0.5)
    assert (short.edges[0], short.edges[-1]) == (0, 1_146_880)
    assert record.sources is not None
    assert [line.get_ydata()[-1] for line in taken.lines if line.get_label() in ("short", "long")] == record.sources.tokens[-1].tolist()
    assert packing.get_ylim()[0] < 0.993 < 1 < packing.get_ylim()[1]
    assert "short 819,200 tokens (2.05 epochs), long 327,680 tokens (0.328 epochs)" in plot.caption
    assert "360 documents were split" in plot.caption


def test_runs_without_sources_say_so(make_run: MakeRun, synthetic: Any) -> None:
    lines = [{key: value for key, value in line.items() if key != "sources"} for line in synthetic.metrics()]
    plot = source_plot(read_record(make_run(lines=lines)))
    assert plot.figure is None
    assert "no line of metrics.jsonl says" in plot.absent


@pytest.mark.parametrize(
    "change", [{"sources": 3}, {"epochs": {"short": 1}}, {"sources": {"short": -1, "long": 0}}, {"split_documents": None}]
)
def test_broken_source_figures_are_refused(make_run: MakeRun, synthetic: Any, change: dict[str, Any]) -> None:
    lines = synthetic.metrics()
    next(line for line in lines if "loss" in line).update(change)
    with pytest.raises(ValueError, match="'sources' and 'epochs' must hold a count by source"):
        read_record(make_run(lines=lines))


def test_position_plot_marks_the_previous_length(record: Record) -> None:
    axes = _axes(position_plot(record.name, record.positions).figure)
    losses = axes[0::2]
    assert [panel.get_title(loc="left").split(":")[0] for panel in losses] == ["8K", "32K"]
    for panel, previous in zip(losses, (2048, 8192), strict=True):
        assert [set(line.get_xdata()) for line in panel.lines] == [{previous}]
        assert panel.get_xscale() == "log"
        stairs = {patch.get_label(): patch.get_data() for patch in panel.patches if hasattr(patch, "get_data")}
        assert set(stairs) == {"before the stage", "after the stage"}
        for data in stairs.values():
            assert (data.edges[0], data.edges[-1]) == (128, 4 * previous)  # the bin from zero is drawn from 128, half its end
            assert previous in data.edges
    assert record.positions is not None
    for panel, stage in zip(axes[1::2], record.positions, strict=True):
        better, worse = (patch.get_data() for patch in panel.patches if hasattr(patch, "get_data"))
        assert better.edges.size < stage.edges.size  # neighbouring bins are merged
        assert np.nanmax(better.values) < 0 < better.values.size - np.isnan(better.values).sum()
        assert not (worse.values <= 0).any()
        assert better.values[-1] == pytest.approx((stage.after - stage.before)[-1], abs=0.15)
    assert "change inside −0.033, beyond −0." in losses[0].get_title(loc="left")


def test_needle_plot_shows_every_cell_where_it_belongs(record: Record, synthetic: Any) -> None:
    """Lengths to the right, depths downwards, percent in the cells, and a line where samples get longer than training's rows."""
    plot = needle_plot(record.name, record.needles)
    maps = [axes for axes in _axes(plot.figure) if axes.images]
    cells = synthetic.needles()["cells"]
    for axes, task in zip(maps, ("single", "multi_key", "variables"), strict=True):
        assert axes.get_title(loc="left").startswith(f"{task}: ")
        lengths, depths = ([label.get_text() for label in labels] for labels in (axes.get_xticklabels(), axes.get_yticklabels()))
        shown = {(depths[round(t.get_position()[1])], lengths[round(t.get_position()[0])]): t.get_text() for t in axes.texts}
        expected = {(f"{c['depth']:.0%}", f"{c['length']:,}"): f"{100 * c['accuracy']:.0f}" for c in cells if c["task"] == task}
        assert shown == expected
        assert (depths[0], lengths[0]) == ("0%", "2,048")
        bottom, top = axes.get_ylim()
        assert bottom > top  # depth 0 is above
        assert {x for line in axes.lines for x in line.get_xdata()} == {3.5}  # between 32,768, the longest row trained on, and 65,536
        assert axes.images[0].get_clim() == (0, 1)
    assert "variables 60% at 2,048" in plot.alt


@pytest.mark.parametrize(("keys", "says"), [("7", "multi_key: 7 keys, one"), ("1/64", "multi_key: a key for each 64 tokens, one")])
def test_needle_plot_says_how_many_keys_there_are(record: Record, synthetic: Any, keys: str, says: str) -> None:
    plot = needle_plot(record.name, read_needles(synthetic.needles() | {"keys": keys}, Path("needle.json")))
    assert any(axes.get_title(loc="left").startswith(says) for axes in _axes(plot.figure))


def test_position_plot_of_unmeasured_parts(make_run: MakeRun) -> None:
    run = make_run()
    path = run / "evaluation" / "positions.json"
    value = json.loads(path.read_text())
    stage = value["stages"][0]
    stage["count"][3], stage["before"][3], stage["after"][5] = 0, None, float("nan")
    stage["beyond"] = {"before": None, "after": None}
    path.write_text(json.dumps(value))
    record = read_record(run)
    plot = position_plot(record.name, record.positions)
    assert "beyond not measured" in _axes(plot.figure)[0].get_title(loc="left")
    assert plot.figure is not None
    assert png(plot.figure).startswith(b"\x89PNG")


def test_expert_map_is_share_times_experts_around_one(record: Record, synthetic: Any) -> None:
    plot = expert_plot(record)
    (image,) = _axes(plot.figure)[0].images
    assert record.validation.expert_load is not None
    drawn = image.get_array()
    last = [line["expert_load"] for line in synthetic.metrics() if "expert_load" in line][-1]
    np.testing.assert_array_equal(record.validation.expert_load, last)
    assert drawn.shape == (synthetic.LAYERS, synthetic.EXPERTS)
    np.testing.assert_allclose(drawn.mean(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(drawn, record.validation.expert_load * synthetic.EXPERTS)
    assert float(image.norm(1.0)) == 0.5
    assert f"from {drawn.min():.2f} to {drawn.max():.2f} times an even share" in plot.alt


def test_router_maps_show_every_layer_over_the_tokens(record: Record, synthetic: Any) -> None:
    entropy, load, dropped, *_ = (axes for axes in _axes(router_plot(record).figure) if axes.get_label() != "<colorbar>")
    lines = [line for line in synthetic.metrics() if "loss" in line]
    for axes, name in ((entropy, "entropy"), (load, "load_entropy")):
        (mesh,) = axes.collections
        figures = np.array([line["router"][name] for line in lines]).T
        np.testing.assert_allclose(mesh.get_array(), figures)
        edges = mesh.get_coordinates()[0, :, 0]
        assert edges.tolist() == [0, *(line["tokens"] for line in lines)]
        assert mesh.get_clim()[1] == pytest.approx(np.log(synthetic.EXPERTS))
    worst = _line(dropped, "the layer that drops most").get_ydata()
    np.testing.assert_allclose(worst, [line["router"]["dropped"][-1] for line in lines])


def test_router_maps_of_many_steps_are_means(make_run: MakeRun, synthetic: Any) -> None:
    lines = [line for line in synthetic.metrics() if "loss" in line]
    many = [lines[-1] | {"step": 1000 + i, "tokens": 1_146_880 + 8 * i, "router": lines[i % 2]["router"]} for i in range(800)]
    record = read_record(make_run(lines=many))
    (mesh,) = _axes(router_plot(record).figure)[0].collections
    mean = np.mean([line["router"]["entropy"] for line in lines[:2]], axis=0)
    np.testing.assert_allclose(mesh.get_array(), np.repeat(mean[:, None], 400, axis=1))
    assert mesh.get_coordinates()[0, 1:, 0].tolist() == [line["tokens"] for line in many[1::2]]


def test_routers_without_drops_and_without_figures(make_run: MakeRun, synthetic: Any) -> None:
    lines = synthetic.metrics()
    for line in lines:
        if "router" in line:
            line["router"]["dropped"] = [0.0] * synthetic.LAYERS
    kept, run = [line for line in lines if line["step"] > 3], make_run(lines=lines)
    assert len([axes for axes in _axes(router_plot(read_record(run)).figure) if axes.get_label() != "<colorbar>"]) == 2
    without = [{key: value for key, value in line.items() if key != "router"} for line in lines if line["step"] <= 3]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without + kept))
    record = read_record(run)
    (mesh,) = _axes(router_plot(record).figure)[0].collections
    assert mesh.get_coordinates()[0, 0, 0] == without[-1]["tokens"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without))
    assert router_plot(read_record(run)).absent == "no line of metrics.jsonl has the routers' figures."


@pytest.mark.parametrize("broken", [{"entropy": [1.0]}, {"entropy": 1, "load_entropy": 1, "load_max": 1, "dropped": 1}, [1.0], "x"])
def test_broken_router_figures_are_refused(make_run: MakeRun, synthetic: Any, broken: Any) -> None:
    lines = synthetic.metrics()
    lines[5]["router"] = broken
    with pytest.raises(ValueError, match=r"metrics.jsonl line 6: 'router' must hold entropy, load_entropy, load_max, dropped: each a list"):
        read_record(make_run(lines=lines))


def test_throughput_shows_mfu_where_measured(make_run: MakeRun, synthetic: Any) -> None:
    lines = [line | {"mfu": 0.41} if "loss" in line else line for line in synthetic.metrics()]
    record = read_record(make_run(lines=lines))
    speed, mfu = _axes(throughput_plot(record, summarize(record)).figure)
    measured = [line for line in mfu.lines if len(line.get_xdata()) > 2]  # the others mark where a stage begins
    assert [set(line.get_ydata()) for line in measured] == [{0.41}] * 3
    means = [path.vertices[0, 1] for collection in speed.collections for path in collection.get_paths()]
    np.testing.assert_allclose(means, np.array([row.tokens_per_second for row in summarize(record).stages], dtype=float))


def test_smoothing_keeps_slopes_stages_and_gaps() -> None:
    stage = np.repeat([0, 1], [30, 20])
    y = np.where(stage == 0, np.arange(50.0), 1000.0)
    np.testing.assert_allclose(smooth(y, stage, 9), y)  # a straight line stays, also at both ends of a stage
    y[40] = np.nan
    np.testing.assert_allclose(smooth(y, stage, 9)[30:], 1000.0)
    assert np.isnan(smooth(np.full(5, np.inf), np.zeros(5, dtype=int), 3)).all()
    noisy = np.random.default_rng(0).normal(size=2000)
    assert smooth(noisy, np.zeros(2000, dtype=int), window_for(2000))[100:-100].std() < 0.2
    assert window_for(39) == 1


def test_words() -> None:
    assert [decimal(value) for value in (0.0, 0.0015, 950, 20_000, 1_200_000, 3.5e12)] == ["0", "0.0015", "950", "20K", "1.2M", "3.5T"]
    assert [binary(value) for value in (128, 8192, 2**20)] == ["128", "8K", "1M"]
    assert [duration(value) for value in (41.6, 725, 12_000, 1e6, float("nan"))] == [
        "42 s",
        "12 min 5 s",
        "3 h 20 min",
        "277 h",
        "not finite",
    ]
    assert [change(value) for value in (-0.0333, 0.5, None, float("inf"))] == ["−0.033", "+0.500", "not measured", "not finite"]
    assert [nats(value) for value in (3.4121, -0.6211, None, float("nan"))] == ["3.412", "−0.621", "not measured", "not finite"]
    assert [brief(999_999_999), brief(3_573_547_008_000)] == ["999,999,999", "3.574T"]
    assert [fit(9, "length 2,048", "2,048"), fit(4, "extend")] == ["2,048", "ext…"]


def test_gradient_plot_shows_kinds_and_refused_steps(record: Record) -> None:
    """A line of each kind on a logarithmic axis, a cross for each of the two refused steps, and the caption says why."""
    plot = gradient_plot(record)
    assert plot.figure is not None and record.gradients is not None
    (axes,) = plot.figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert {"lightning, early", "lightning, late", "softmax", "experts", "routers", "norms", "embedding", "head", "not applied"} <= set(
        lines
    )
    assert axes.get_yscale() == "log"
    early = np.asarray(lines["lightning, early"].get_ydata())
    assert sorted(record.training.step[np.argsort(early)[-3:]].tolist()) == [121, 122, 123]
    crosses = np.asarray(lines["not applied"].get_xdata())
    assert crosses.tolist() == record.training.tokens[np.isin(record.training.step, (122, 123))].tolist()
    assert "did not apply 2 steps (step 122: gradient norm 9.1" in plot.caption
    assert "The run went back from step 130 to step 124: 6 steps in a row" in plot.caption


def test_parts_plot_shows_sources_and_lengths(record: Record) -> None:
    """Four panels; lengths in order, whichever came first; a line has no point where its bucket was empty."""
    plot = parts_plot(record)
    panels = _axes(plot.figure)
    assert [axes.get_yscale() for axes in panels] == ["linear", "linear", "log", "log"]
    names = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels]
    assert names == [["short", "long"], ["up to 1,024", "up to 4,096", "up to 16,384"]] * 2
    second, third = (record.span(stage) for stage in (1, 2))
    assert second and third
    middle = np.asarray(_line(panels[1], "up to 4,096").get_xdata())
    assert second[0] < middle.min() and middle.max() <= third[0] + 32768
    short, gradient = (np.asarray(_line(panels[place], "short").get_ydata()) for place in (0, 2))
    assert gradient == pytest.approx(short / 5)
    assert "up to 16,384" in plot.caption


@pytest.mark.parametrize("change", [{"source_loss": 3}, {"length_gradient": {"64": "much"}}])
def test_parts_that_are_no_numbers(make_run: MakeRun, synthetic: Any, change: dict[str, Any]) -> None:
    lines = synthetic.metrics()
    lines[5] |= change
    with pytest.raises(ValueError, match="line 6: 'source_loss', .* must each hold a number by name"):
        read_record(make_run(lines=lines))


def test_runs_without_gradient_norms_say_so(make_run: MakeRun, synthetic: Any) -> None:
    lines = [{key: value for key, value in line.items() if key not in ("grad_norms", "refused", "rewound")} for line in synthetic.metrics()]
    plot = gradient_plot(read_record(make_run(lines=lines)))
    assert plot.figure is None
    assert "no line" in plot.absent


@pytest.mark.parametrize(
    "change", [{"grad_norms": 3}, {"grad_norms": {"softmax": -1}}, {"refused": "because"}, {"refused": {}}, {"rewound": {"from_step": 3}}]
)
def test_gradient_figures_that_are_none(make_run: MakeRun, synthetic: Any, change: dict[str, Any]) -> None:
    lines = synthetic.metrics()
    lines[5] |= change
    with pytest.raises(ValueError, match="'grad_norms' must hold a norm by kind"):
        read_record(make_run(lines=lines))
