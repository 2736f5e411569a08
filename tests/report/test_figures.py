import math
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import pytest

from replica_newton.report.figures import convergence_figure, save_convergence
from replica_newton.report.style import figure_svg


def lines(axes):
    """Lines of the panel by their label, without the crosses."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def legend_labels(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()} - {""}


def tick_labels(figure, axis):
    figure.draw_without_rendering()
    return [label.get_text() for label in axis.get_ticklabels()]


def test_one_line_for_each_method_and_number_of_replicas(ladder):
    figure = convergence_figure(ladder)
    expected = {"SGD", "paper, M = 1", "paper, M = 2", "paper, M = 4", "paper, M = 8", "mine, M = 1"}
    assert [set(lines(axes)) for axes in figure.axes] == [expected, expected]
    assert legend_labels(figure) == expected
    assert [axes.get_xlabel() for axes in figure.axes] == ["epochs", "gradient evaluations (samples)"]
    assert "digits" in figure.get_suptitle()


def test_lines_are_medians_and_bands_are_ranges(ladder):
    by_epoch, by_evaluation = convergence_figure(ladder).axes
    line = lines(by_epoch)["paper, M = 8"]
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.105])
    assert list(lines(by_evaluation)["paper, M = 8"].get_xdata()) == [600, 1200]
    assert len(by_epoch.collections) == 6
    heights = by_epoch.collections[4].get_paths()[0].vertices
    assert {round(y, 6) for x, y in heights if x == 2} == {0.1, 0.11}


def test_no_band_for_one_seed(make_run, make_summary):
    figure = convergence_figure(make_summary(make_run("sgd", 1, nll=[0.9, 0.4])))
    assert not figure.axes[0].collections
    assert figure.legends[0].get_title().get_text() == ""


def test_colours_differ_by_method_and_replicas(ladder):
    by_epoch, by_evaluation = convergence_figure(ladder).axes
    colours = {label: line.get_color() for label, line in lines(by_epoch).items()}
    assert len(set(colours.values())) == len(colours)
    assert {label: line.get_color() for label, line in lines(by_evaluation).items()} == colours


def test_only_the_best_rate_is_drawn(make_run, make_summary):
    summary = make_summary(*(make_run("sgd", 1, rate=rate, nll=[1.0, rate]) for rate in (0.5, 0.25, 0.75)))
    (line,) = convergence_figure(summary).axes[0].lines
    assert line.get_label() == "SGD, rate 0.25"
    assert list(line.get_ydata()) == [1.0, 0.25]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_diverged_run_is_named_and_does_not_stretch_the_axis(make_run, make_summary, bad):
    figure = convergence_figure(
        make_summary(make_run("sgd", 1, nll=[0.9, 0.5, 0.4]), make_run("paper", 4, nll=[0.8, 80.0, bad]))
    )
    assert legend_labels(figure) == {"SGD", "paper, M = 4 (diverged)"}
    top = figure.axes[0].get_ylim()[1]
    assert 0.9 < top < 1.0
    (cross,) = (line for line in figure.axes[0].lines if line.get_marker() == "x")
    # On the straight line (log scale) from 0.8 at epoch 1 to 80 at epoch 2.
    assert cross.get_xdata()[0] == pytest.approx(1 + math.log(top / 0.8) / math.log(100))
    assert cross.get_ydata()[0] == pytest.approx(top)
    figure.draw_without_rendering()


@pytest.mark.parametrize("losses", [[None], [0.0, 0.0], [None, None], []])
def test_nothing_to_draw(make_run, make_summary, tmp_path, losses):
    summary = make_summary(make_run("sgd", 1, nll=losses))
    save_convergence(summary, tmp_path)
    assert bool(convergence_figure(summary).legends) == bool(losses)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([2.0, 0.01], {"0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"}), ([0.42, 0.35], {"0.36", "0.38", "0.4"})],
)
def test_nll_ticks_are_plain_decimals(make_run, make_summary, losses, expected):
    figure = convergence_figure(make_summary(make_run("sgd", 1, nll=losses)))
    assert figure.axes[0].get_yscale() == "log"
    labels = tick_labels(figure, figure.axes[0].yaxis)
    assert expected <= set(labels)
    assert not any("e" in label or "$" in label for label in labels)


def test_gradient_evaluations_in_thousands(make_run, make_summary):
    figure = convergence_figure(make_summary(make_run("sgd", 1, nll=[0.9, 0.5, 0.4, 0.3, 0.2], work=60_000)))
    assert {"60k", "300k"} & set(tick_labels(figure, figure.axes[1].xaxis))


def test_names_are_not_read_as_mathematics(make_run, make_summary):
    summary = make_summary(make_run(r"$\frac{$", 1, nll=[0.9, 0.5]), dataset=r"$\frac{$")
    convergence_figure(summary).draw_without_rendering()


def test_saved_files(ladder, tmp_path):
    save_convergence(ladder, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["convergence.png", "convergence.svg"]
    png = (tmp_path / "new" / "convergence.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    # Width in pixels, from the header of the file: 10 inches at 150 dpi or more.
    assert int.from_bytes(png[16:20], "big") >= 1500
    assert ET.parse(tmp_path / "new" / "convergence.svg").getroot().tag.endswith("svg")  # noqa: S314


def test_same_summary_gives_the_same_svg(ladder):
    assert figure_svg(convergence_figure(ladder)) == figure_svg(convergence_figure(ladder))


def test_settings_of_the_user_are_neither_used_nor_changed(ladder):
    plain = figure_svg(convergence_figure(ladder))
    with mpl.rc_context({"axes.facecolor": "red", "svg.fonttype": "none", "lines.linestyle": ":"}):
        before = dict(mpl.rcParams)
        assert figure_svg(convergence_figure(ladder)) == plain
        assert dict(mpl.rcParams) == before


def test_pyplot_is_not_loaded():
    code = "import sys, replica_newton.report.html; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_legend_of_many_long_labels_stays_inside_the_figure(make_run, make_summary):
    methods = [
        ("sgd", 1),
        ("adam", 1),
        ("paper-common", 8),
        ("paper-random", 8),
        *(("saddle-free", M) for M in (2, 4, 8)),
    ]
    runs = [make_run(*method, rate=rate, nll=[0.5, 0.2]) for method in methods for rate in (0.03, 0.1)]
    figure = convergence_figure(make_summary(*runs))
    figure.canvas.draw()
    frame = figure.legends[0].get_window_extent()
    assert 0 <= frame.x0 < frame.x1 <= figure.bbox.x1
