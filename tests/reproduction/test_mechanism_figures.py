import copy
import json
import xml.etree.ElementTree as ET

import pytest

from replica_newton.report.style import figure_svg, save_figure
from replica_newton.reproduction.mechanism_figures import mechanism_figure


def line(*middle):
    return {"median": list(middle), "low": [0.9 * y for y in middle], "high": [1.1 * y for y in middle]}


@pytest.fixture
def measurements():
    """Made up, in the shape that `measure_mechanism` gives."""
    shares = {which: line(0.1, 0.2, 0.3) for which in ("fresh", "batch", "replica")}
    made = {
        "task": {"dataset": "mnist", "activation": "relu", "parameters": 16358, "steps": 600, "quick": True},
        "signal_against_rate": {
            "rates": [0.01, 0.1, 1.0],
            "linear": line(0.02, 0.2, 2.0),
            "secant": line(0.02, 0.21, 1.5),
            "early_step": 50,
            "early": line(0.001, 0.01, 0.1),
            "secant_crossing": 0.6,
        },
        "signal_against_shard": {
            "rate": 0.01,
            "shards": [8, 32],
            "ratio": line(0.1, 0.1),
            "fixed": line(0.1, 0.2),
            "crossing": None,
        },
        "inverse_curvature": {
            "groups": [
                {"data": data, "rate": rate, "true": [0.05, 0.2], "claimed": [rate, 0.1]}
                for data in ("own", "common")
                for rate in (0.01, 0.3)
            ]
        },
        "overshoot": {
            "replicas": [2, 4, 8],
            "groups": [
                {"size": 1000, "exponent": p, "error": error, "displacements": kind, "captured_length": line(3, 2, 1)}
                for p in (1.0, 2.0)
                for error in ("isotropic", "sharp")
                for kind in ("random", "local", "power")
            ],
        },
        "captured": {
            "replicas": [2, 4, 8],
            "eigenvectors": [0.1, 0.3, 0.5],
            **dict.fromkeys(("own", "common"), shares),
        },
        "spectrum": {
            "checkpoints": [
                {"step": 50, "eigenvalues": [5.0 / i for i in range(1, 25)], "outliers": 9, "gap": 1.5},
                {
                    "step": 600,
                    "eigenvalues": [(-1) ** i * 50 / i for i in range(1, 25)],
                    "outliers": 10,
                    "gap": 3.14159,
                },
            ]
        },
    }
    made["captured"]["random"] = shares
    return json.loads(json.dumps(made))


def labels(axes):
    return {text.get_text() for text in axes.get_legend().get_texts()}


def test_panels(measurements):
    figure = mechanism_figure(measurements)
    assert len(figure.axes) == 6
    titles = [axes.get_title("left") for axes in figure.axes]
    assert [title[0] for title in titles] == list("abcdef")
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    assert "MNIST" in figure.get_suptitle()
    assert "16,358" in figure.get_suptitle()


def test_lines_and_bands_show_the_measurements(measurements):
    axes = mechanism_figure(measurements).axes
    lines = {one.get_label(): list(one.get_ydata()) for one in axes[0].lines}
    assert lines["gradient differences"] == pytest.approx([0.02, 0.21, 1.5])
    assert len(axes[0].collections) == 3
    spectrum = {one.get_label(): list(one.get_ydata()) for one in axes[5].lines}
    (early,) = (y for label, y in spectrum.items() if label.startswith("step 50: gap × 1.50 after 9"))
    assert early == pytest.approx([5.0 / i for i in range(1, 25)])


def test_legends(measurements):
    axes = mechanism_figure(measurements).axes
    groups = {f"{data}, α = {rate}" for data in ("own shards", "common shard") for rate in (0.01, 0.3)}
    assert labels(axes[2]) == groups | {"taken = true"}
    assert {"random", "local steps", "power iteration"} < labels(axes[3])
    assert any(label.startswith("step 600: gap × 3.14 after 10") for label in labels(axes[5]))


def test_lines_differ_by_colour_and_marker(measurements):
    for axes in mechanism_figure(measurements).axes[:5]:
        looks = [(one.get_color(), one.get_marker()) for one in axes.lines if one.get_marker() not in ("None", None)]
        for colour, marker in looks:
            assert {m for c, m in looks if c == colour} == {marker}
            assert {c for c, m in looks if m == marker} == {colour}


def test_nothing_is_written_outside_the_figure(measurements):
    figure = mechanism_figure(measurements)
    figure.canvas.draw()
    for axes in figure.axes:
        frame = axes.get_tightbbox()
        assert 0 <= frame.x0 < frame.x1 <= figure.bbox.x1
        assert 0 <= frame.y0 < frame.y1 <= figure.bbox.y1


def test_one_checkpoint_and_one_exponent(measurements):
    changed = copy.deepcopy(measurements)
    del changed["spectrum"]["checkpoints"][0]
    changed["overshoot"]["groups"] = [group for group in changed["overshoot"]["groups"] if group["exponent"] == 1.0]
    mechanism_figure(changed).draw_without_rendering()


def test_saved_files(measurements, tmp_path):
    save_figure(mechanism_figure(measurements), tmp_path / "new", "mechanism")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mechanism.png", "mechanism.svg"]
    png = (tmp_path / "new" / "mechanism.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") >= 1500
    assert ET.parse(tmp_path / "new" / "mechanism.svg").getroot().tag.endswith("svg")  # noqa: S314


def test_same_measurements_give_the_same_svg(measurements):
    assert figure_svg(mechanism_figure(measurements)) == figure_svg(mechanism_figure(measurements))
