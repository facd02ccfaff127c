"""The pictures: what is drawn, and that names can be read."""

import itertools
import sys

import matplotlib.colors
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from hetlora_agg import (
    ClientUpdate,
    InputTypeError,
    InputValueError,
    aggregate,
    aggregate_layers,
    diagnose,
)
from hetlora_agg.plotting import (
    COLOURS,
    DASHES,
    EXACT,
    plot_contributions,
    plot_energy,
    plot_simulation,
    plot_spectrum,
)
from hetlora_agg.plotting.drawing import apart
from hetlora_agg.simulate import Settings, SimulationResult, simulate_many

ROUNDS = 4


def result(label, final, distance, seed=0):
    accuracy = np.linspace(0.5, final, ROUNDS + 1)
    return SimulationResult(
        label, Settings(rounds=ROUNDS, seed=seed), tuple(accuracy), (distance,) * ROUNDS
    )


def results(count=3):
    return {f"m{i}": result(f"m{i}", 0.8 + 0.001 * i, 10.0 ** -(1 + i % 3)) for i in range(count)}


def drawn_names(axes):
    """The names beside the lines, with the boxes they are drawn in, in pixels."""
    FigureCanvasAgg(axes.figure).draw()
    named = [text for text in axes.texts if text.arrow_patch is not None]
    # The extent of an annotation includes its leader; the name alone is that of a plain text.
    return {text.get_text(): Text.get_window_extent(text) for text in named}


def updates(ranks=(2, 4, 8), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(r, 12, generator=g), torch.randn(10, r, generator=g)) for r in ranks]


# ---- plot_simulation -----------------------------------------------------------------------------


def test_lines_are_the_means_over_seeds():
    figure = plot_simulation({"a": [result("a", 0.6, 0.1), result("a", 0.9, 0.3, seed=1)]})
    left, right = figure.axes
    assert left.lines[0].get_xdata().tolist() == list(range(ROUNDS + 1))
    assert left.lines[0].get_ydata()[-1] == pytest.approx(0.75)
    assert right.lines[0].get_xdata().tolist() == list(range(1, ROUNDS + 1))
    assert right.lines[0].get_ydata() == pytest.approx([0.2] * ROUNDS)
    assert right.get_yscale() == "log"
    assert "mean of 2 seeds" in figure.get_suptitle()


def test_a_single_result_and_one_seed_will_do():
    assert len(plot_simulation(result("a", 0.6, 0.1)).axes[0].lines) == 1
    assert "one seed" in plot_simulation(results()).get_suptitle()


def test_skipped_methods_are_left_out_and_all_skipped_is_an_error():
    skipped = SimulationResult("fedit", Settings(), skipped="no")
    figure = plot_simulation({**results(), "fedit": skipped})
    assert set(drawn_names(figure.axes[0])) == {"m0", "m1", "m2"}
    with pytest.raises(InputValueError, match="at least one method that ran"):
        plot_simulation({"fedit": skipped})


def test_rounding_is_drawn_as_exact_and_never_as_a_number():
    figure = plot_simulation({"a": result("a", 0.6, 0.1), "flora": result("flora", 0.6, 1e-16)})
    right = figure.axes[1]
    lowest = min(line.get_ydata().min() for line in right.lines)
    assert EXACT < lowest < 0.1
    assert right.get_ylim()[0] < lowest
    assert any("exact" in text.get_text() for text in right.texts)
    without = plot_simulation(result("a", 0.6, 0.1)).axes[1]
    assert not any("exact" in text.get_text() for text in without.texts)


def test_only_exact_methods_can_be_drawn():
    right = plot_simulation(result("flora", 0.6, 0.0)).axes[1]
    assert np.isfinite(right.lines[0].get_ydata()).all()


@pytest.mark.parametrize("count", [1, 9, 26])
def test_names_do_not_overlap_each_other_or_the_data(count):
    figure = plot_simulation(results(count))
    for axes in figure.axes:
        boxes = drawn_names(axes)
        assert len(boxes) == count
        for one, other in itertools.combinations(boxes.values(), 2):
            assert not one.overlaps(other)
        assert min(box.x0 for box in boxes.values()) > axes.bbox.x1
        assert max(box.x1 for box in boxes.values()) <= figure.bbox.x1
        assert max(box.y1 for box in boxes.values()) <= figure.bbox.y1


def test_styles_repeat_only_after_all_combinations():
    left, _ = plot_simulation(results(len(COLOURS) * len(DASHES))).axes
    styles = {(line.get_color(), str(line._dash_pattern)) for line in left.lines}
    assert len(styles) == len(COLOURS) * len(DASHES)


def test_colours_differ_in_the_grey_of_a_print():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    grey = sorted(luminance(matplotlib.colors.to_rgb(colour)) for colour in COLOURS)
    assert grey[-1] < 0.5  # readable on white
    assert np.diff(grey).min() > 0.005


# ---- plot_spectrum -------------------------------------------------------------------------------


def test_spectrum_shows_singular_values_and_the_cut():
    full = aggregate(updates(), "flexlora", rank="full")
    axes = plot_spectrum(full, rank=3).axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx(full.singular_values.numpy())
    assert axes.lines[1].get_xdata() == [3.5, 3.5]
    squares = full.singular_values.double().square()
    share = float(squares[:3].sum() / squares.sum())
    assert f"rank 3 keeps {share:.1%} of the energy" in axes.get_title(loc="left")


def test_spectrum_of_a_truncated_result_counts_what_was_cut_off():
    full = aggregate(updates(), "flexlora", rank="full").singular_values.double().square()
    share = float(full[:5].sum() / full.sum())
    for cut in (aggregate(updates(), "flexlora", rank=5),):
        for source in (cut, diagnose(updates(), cut), {"q": cut}):
            title = plot_spectrum(source).axes[0].get_title(loc="left")
            assert f"rank 5 keeps {share:.1%}" in title


def test_spectrum_of_a_method_without_svd_is_computed():
    stacked = aggregate(updates(), "flora")
    expected = np.linalg.svd(stacked.factors.dense().numpy(), compute_uv=False)
    drawn = plot_spectrum(stacked).axes[0].lines[0].get_ydata()
    assert drawn == pytest.approx(expected[: len(drawn)], rel=1e-4)


def test_spectra_of_layers_are_named_until_there_are_too_many():
    layers = aggregate_layers({name: updates(seed=i) for i, name in enumerate("qkv")})
    assert set(drawn_names(plot_spectrum(layers).axes[0])) == {"q", "k", "v"}
    many = aggregate_layers({f"l{i}": updates(seed=i) for i in range(20)})
    axes = plot_spectrum(many).axes[0]
    assert drawn_names(axes) == {}
    assert len(axes.lines) == 20 + 1
    assert "in 20 layers" in axes.get_title(loc="left")


def test_leading_dimensions_are_layers_too():
    batch = [(torch.stack([A, 2 * A]), torch.stack([B, B])) for A, B in updates()]
    assert set(drawn_names(plot_spectrum(aggregate(batch)).axes[0])) == {"[0]", "[1]"}


def test_spectrum_refuses_what_has_none():
    with pytest.raises(InputTypeError, match="expected a result of aggregate"):
        plot_spectrum("rb")
    with pytest.raises(InputTypeError, match="expected a result of aggregate"):
        plot_spectrum({})
    with pytest.raises(InputValueError, match="rank: expected at least 1, got 0"):
        plot_spectrum(aggregate(updates()), rank=0)


def test_a_zero_update_has_a_picture():
    zero = aggregate([(torch.ones(2, 3), torch.zeros(4, 2))], "rb")
    assert "keeps 100.0%" in plot_spectrum(zero).axes[0].get_title(loc="left")


# ---- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [lambda: plot_simulation(results()), lambda: plot_spectrum({})])
def test_missing_matplotlib_names_the_extra(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hetlora-agg\[plot\]"'):
        draw()


@pytest.mark.parametrize(
    "wanted",
    [[0.5], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.0, 0.01, 0.0], [0.9, 0.1, 0.11, 0.95, 0.93]],
)
def test_names_keep_their_order_and_their_distance(wanted):
    placed = apart(np.array(wanted), gap=0.1)
    ordered = np.sort(placed)
    assert (np.diff(ordered) >= 0.1 - 1e-9).all()
    assert ordered[0] >= 0
    assert ordered[-1] <= 1 + 1e-9
    assert (np.argsort(placed) == np.argsort(wanted, kind="stable")).all()


def test_names_that_do_not_touch_stay_where_they_are():
    assert apart(np.array([0.2, 0.8]), gap=0.1) == pytest.approx([0.2, 0.8])
    assert apart(np.array([0.5, 0.5]), gap=0.1) == pytest.approx([0.45, 0.55])


def test_one_round_is_a_point_one_can_see():
    one = SimulationResult("rb", Settings(rounds=1), (0.5, 0.6), (0.3,))
    right = plot_simulation(one).axes[1]
    (line,) = [line for line in right.lines if len(line.get_xdata()) == 1]
    assert line.get_marker() == "o"
    assert right.get_xlim() == (0.5, 1.5)


def test_layers_named_by_numbers_keep_their_names():
    layers = aggregate_layers({k: updates(seed=k) for k in range(3)})
    assert set(drawn_names(plot_spectrum(layers).axes[0])) == {"0", "1", "2"}


def test_spectra_of_numpy_results_are_drawn_too():
    rng = np.random.default_rng(0)
    updates = [(rng.standard_normal((r, 6)), rng.standard_normal((5, r))) for r in (2, 3)]
    result = aggregate(updates, "rb", rank=2)
    assert isinstance(result.certificate.tail, np.ndarray)
    assert plot_spectrum(result).axes


# ---- contributions and energy --------------------------------------------------------------------


def test_contributions_are_the_shares_of_an_exact_mean():
    torch.manual_seed(0)
    layers = {
        name: [
            ClientUpdate(torch.randn(r, 6), torch.randn(5, r), weight=r, id=f"c{r}") for r in r_k
        ]
        for name, r_k in {"q": (1, 2, 3), "v": (2, 3)}.items()
    }
    results = aggregate_layers(layers, "flora", missing="renormalise")
    report = diagnose(layers, results, missing="renormalise")
    axes = plot_contributions(report).axes[0]
    cells = axes.images[0].get_array()
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["q", "v"]
    assert sorted(names) == ["c1", "c2", "c3"]
    # of an exact mean the parts are the whole; who lacks a layer has no cell there
    np.testing.assert_allclose(np.nansum(np.ma.filled(cells, np.nan), axis=0), 1.0, atol=1e-5)
    assert np.isnan(np.ma.filled(cells, np.nan)[names.index("c1"), 1])
    mean = results["q"].factors.dense()
    update = layers["q"][0].B @ layers["q"][0].A
    part = float((update * mean).sum() / mean.square().sum()) / 6
    assert abs(cells[names.index("c1"), 0] - part) < 1e-5


def test_contributions_of_what_is_no_report():
    with pytest.raises(InputTypeError, match="expected a Report from diagnose, got list"):
        plot_contributions([])


def test_contributions_of_zero_updates_are_zero():
    zero = [(torch.ones(1, 3), torch.zeros(2, 1))] * 2
    axes = plot_contributions(diagnose(zero, aggregate(zero))).axes[0]
    assert float(np.abs(axes.images[0].get_array()).max()) == 0.0


def test_energy_over_the_rounds():
    runs = simulate_many(["rb", "flexlora"], ranks=(2, 4), rounds=2)
    left, right = plot_energy(runs).axes
    for axes, what in ((left, "energy_ratio"), (right, "effective_rank")):
        drawn = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 2]
        for run in runs.values():
            assert any(np.allclose(y, getattr(run, what)) for y in drawn)
    with pytest.raises(InputValueError, match="plot_energy: expected at least one method that ran"):
        plot_energy({})
