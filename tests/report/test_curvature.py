"""The figure of a run's curvature."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from replica_newton.report.curvature import curvature_figure, load_curvature


def probes(count: int, *names: str) -> list[dict[str, Any]]:
    values = {"sharpness": 5.0, "eigenvalue_1": -8.0, "eigenvalue_2": 5.0, "stability_ratio": 0.7} | {
        "captured_gradient_fraction": 0.4,
        "gradient_noise_scale": 900.0,
    }
    return [{"step": 1 + 10 * k, **{f"curvature/{name}": values[name] for name in names}} for k in range(count)]


EIGENVALUES = ("sharpness", "eigenvalue_1", "eigenvalue_2")


@pytest.mark.parametrize(
    ("names", "panels"),
    [
        ((), 1),
        (EIGENVALUES, 1),
        ((*EIGENVALUES, "captured_gradient_fraction"), 2),
        ((*EIGENVALUES, "captured_gradient_fraction", "gradient_noise_scale"), 3),
        ((*EIGENVALUES, "stability_ratio", "captured_gradient_fraction", "gradient_noise_scale"), 4),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
@pytest.mark.parametrize("count", [1, 30])
def test_there_is_a_panel_for_all_that_was_seen(names: tuple[str, ...], panels: int, count: int):
    figure = curvature_figure(probes(count, *names))
    figure.draw_without_rendering()
    assert len(figure.axes) == panels


def test_lines_have_the_values_that_were_seen_and_gaps_are_left_out():
    seen = probes(3, *EIGENVALUES)
    del seen[0]["curvature/sharpness"]
    seen[1]["curvature/eigenvalue_1"] = math.nan
    eigenvalues = curvature_figure(seen).axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in eigenvalues.get_lines()}
    assert lines["sharpness (largest)"] == [[11.0, 5.0], [21.0, 5.0]]
    assert lines["tracked"] == [[1.0, -8.0], [21.0, -8.0]]


def test_what_was_written_is_read(tmp_path: Path):
    seen = probes(2, *EIGENVALUES)
    path = tmp_path / "curvature.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in seen))
    assert load_curvature(path) == seen
