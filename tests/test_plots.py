"""Figures: what is drawn, not how it looks."""

import builtins
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import nn

from wcr_optim import plots
from wcr_optim.metrics import concentration
from wcr_optim.pruning.sweep import SweepResult, SweepRow

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


def result(values, name="accuracy"):
    rows = tuple(SweepRow(s, int(100 * s), 100, {"loss": -v, name: v}) for s, v in zip(SPARSITIES, values, strict=True))
    return SweepResult(rows, "global", False)


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_means_and_sample_deviations_over_seeds():
    seeds = [result(np.array([5.0, 4, 3, 3, 2, 1]) * scale) for scale in (1.0, 1.5, 2.3)]
    ax = plots.sparsity_accuracy({"three": seeds, "one": seeds[0]}, metric="accuracy")
    drawn = lines(ax)
    values = np.array([seed.values("accuracy") for seed in seeds])
    assert np.allclose(drawn["three"].get_ydata(), values.mean(0))
    assert np.allclose(drawn["three"].get_xdata(), SPARSITIES)
    assert np.allclose(drawn["one"].get_ydata(), values[0])
    (band,) = ax.collections  # none for the single seed
    edges = band.get_paths()[0].vertices
    for sparsity, mean, deviation in zip(SPARSITIES, values.mean(0), values.std(0, ddof=1), strict=True):
        heights = edges[np.isclose(edges[:, 0], sparsity), 1]
        assert np.isclose(heights.min(), mean - deviation)
        assert np.isclose(heights.max(), mean + deviation)
    assert ax.get_ylabel() == "accuracy"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["three", "one"]


def test_the_first_metric_and_pairs():
    pairs = [(0.9, 1.0), (0.5, 3.0), (0.9, 2.0), (0.5, 3.0)]
    ax = plots.sparsity_accuracy({"sweep": result(range(6)), "pairs": pairs})
    assert ax.get_ylabel() == "loss"
    assert lines(ax)["pairs"].get_xydata().tolist() == [[0.5, 3.0], [0.9, 1.5]]
    assert lines(ax)["sweep"].get_ydata().tolist() == [0, -1, -2, -3, -4, -5]
    assert plots.sparsity_accuracy({"pairs": pairs}, ylabel="Dice").get_ylabel() == "Dice"
    assert plots.sparsity_accuracy({"pairs": pairs}).get_ylabel() == "score"


def test_a_trade_off_has_a_point_for_each_strength():
    pairs = {"l1": [(98.0, 60.0), (95.0, 90.0)], "wcr": [(97.5, 80.0)]}
    ax = plots.trade_off(pairs, xlabel="accuracy, dense", ylabel="accuracy at 97%")
    assert {name: list(map(tuple, line.get_xydata())) for name, line in lines(ax).items()} == pairs
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("accuracy, dense", "accuracy at 97%")
    for bad, message in (({}, "at least one result"), ({"l1": [], "wcr": [(1.0, 2.0)]}, "'l1' has no values to draw")):
        with pytest.raises(ValueError, match=message):
            plots.trade_off(bad)


def test_more_curves_than_styles_are_all_drawn():
    many = {str(i): [(i, 1.0), (i, 2.0)] for i in range(70)}
    assert len(lines(plots.trade_off(many))) == 70
    drawn = lines(plots.sparsity_accuracy({name: [(0.5, 1.0), (0.9, 2.0)] for name in many}))
    assert len(drawn) == 70
    looks = {(line.get_color(), line.get_linestyle()) for line in list(drawn.values())[:21]}
    assert len(looks) == 21, "what has the colour of another has another line"


def test_high_sparsities_are_legible():
    ax = plots.sparsity_accuracy({"x": [(s, 0.0) for s in SPARSITIES]})
    assert [tick.get_text() for tick in sorted_ticks(ax)] == ["0", "50", "80", "90", "95", "99"]
    place = ax.transData.transform([(s, 0.0) for s in SPARSITIES])[:, 0]
    assert place[-1] - place[2] > 0.6 * (place[-1] - place[0])
    assert np.all(np.diff(place) > 0)


def sorted_ticks(ax):
    return sorted(ax.get_xticklabels(), key=lambda label: label.get_position()[0])


def test_crowded_ticks_make_room_and_everything_pruned_has_a_place():
    sparsities = [0, 0.1, 0.11, 0.12, 0.5, 0.9, 0.99, 0.991, 1.0]
    ax = plots.sparsity_accuracy({"x": [(s, s) for s in sparsities]})
    assert [tick.get_text() for tick in sorted_ticks(ax)] == ["0", "50", "90", "99.1", "100"]
    low, high = ax.get_xlim()
    x = lines(ax)["x"].get_xdata()
    assert low < x[0]
    assert x[-2] < x[-1] < high < 1
    single = plots.sparsity_accuracy({"x": [(1.0, 0.5)]})
    assert [tick.get_text() for tick in single.get_xticklabels()] == ["100"]


def test_energy_curves_of_models_and_measures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5))
    measured = concentration(model)
    ax = plots.energy_curves({"model": model, "measured": measured, "curve": measured.layers[0].curve})
    drawn = lines(ax)
    assert np.allclose(drawn["model"].get_ydata(), 100 * np.array(measured.total.curve.energy))
    assert np.allclose(drawn["measured"].get_xydata(), drawn["model"].get_xydata())
    assert np.allclose(drawn["curve"].get_ydata(), 100 * np.array(measured.layers[0].curve.energy))
    assert drawn["99.7 % of the energy"].get_ydata()[0] == pytest.approx(99.7)
    assert ax.get_xscale() == "log"


def test_every_curve_has_its_own_look():
    ax = plots.sparsity_accuracy({str(i): [(0.5, i), (0.9, i)] for i in range(18)})
    looks = {(to_hex(line.get_color()), line.get_marker()) for line in ax.get_lines()}
    assert len(looks) == 18


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_saved_without_a_display(tmp_path, suffix, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    for name, draw in {
        "energy": lambda path: plots.energy_curves({"m": nn.Linear(20, 20)}, path),
        "accuracy": lambda path: plots.sparsity_accuracy({str(i): result(range(6)) for i in range(9)}, path),
    }.items():
        path = tmp_path / f"{name}.{suffix}"
        assert isinstance(draw(path).figure.canvas, FigureCanvasAgg)
        assert path.stat().st_size > 2000


def test_given_axes_are_drawn_on_and_saved(tmp_path):
    figure = Figure()
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2)
    ax = left.add_subplot()
    assert plots.energy_curves({"m": nn.Linear(20, 20)}, tmp_path / "both.png", ax) is ax
    assert plots.sparsity_accuracy({"x": [(0.5, 1.0)]}, ax=right.add_subplot()).figure is right
    assert (tmp_path / "both.png").stat().st_size > 2000


def test_pyplot_is_not_touched(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plots.energy_curves({"m": nn.Linear(20, 20)})
    assert "matplotlib.pyplot" not in sys.modules


def test_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'wcr_optim\[plot\]'"):
        plots.energy_curves({"m": nn.Linear(20, 20)})


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plots.energy_curves({}), ValueError, "at least one model"),
        (lambda: plots.sparsity_accuracy({}), ValueError, "at least one result"),
        (lambda: plots.sparsity_accuracy({"x": []}), ValueError, "'x' has no values"),
        (lambda: plots.sparsity_accuracy({"x": [(95, 0.1)]}), ValueError, "sparsities of 'x' must lie in .*, got 95"),
        (lambda: plots.sparsity_accuracy({"x": result(range(6))}, metric="f1"), KeyError, "f1"),
    ],
)
def test_errors(draw, error, message):
    with pytest.raises(error, match=message):
        draw()
