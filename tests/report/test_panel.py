"""The curvature panel as text, at two widths."""

import io
import math

import pytest
import torch
from rich.console import Console

from replica_newton.monitor import CurvatureObservation
from replica_newton.report.panel import CurvaturePanel


def observation(*values: float, residual: float = 0.1, ratio: float | None = None) -> CurvatureObservation:
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    sharpness = float(eigenvalues.max()) if values else math.nan
    return CurvatureObservation(
        step=7,
        eigenvalues=eigenvalues,
        residuals=torch.full_like(eigenvalues, residual),
        uncertainties=torch.full_like(eigenvalues, math.inf),
        sharpness=sharpness,
        preconditioned_sharpness=None if ratio is None else sharpness,
        stability_ratio=ratio,
        learning_rate=0.1,
        captured_gradient_fraction=0.5,
        gradient_noise_scale=None,
    )


def lines(panel: CurvaturePanel, width: int, **options: object) -> list[str]:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(panel)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 120])
def test_every_line_is_as_wide_as_the_terminal_and_bars_have_the_lengths_of_their_values(width: int):
    panel = CurvaturePanel()
    for i in range(300):
        panel.loss(2.0 - 0.005 * i)
    for k in range(4):
        panel.observe(10 * k + 1, observation(10.0 - k, -5.0, 2.5, ratio=(10.0 - k) / 20.0))
    shown = lines(panel, width)
    assert {len(line) for line in shown} == {width}
    assert "curvature at step 31" in shown[0]
    assert [line.split()[1:3] for line in shown[1:-1]] == [
        ["loss", "0.505"],
        ["sharpness", "7"],
        ["of", "limit"],
        ["θ1", "7"],
        ["θ2", "-5"],
        ["θ3", "2.5"],
    ]
    full = width - 25
    assert shown[1].count("█") + shown[1].count("▁") > 2
    assert shown[2].split()[3] == "█▆▃▁"
    assert shown[3].split()[3] == "35%"
    assert shown[3].count("█") == pytest.approx(0.35 * 2 / 3 * full, abs=1)
    for line, share in zip(shown[4:7], (1.0, 5 / 7, 2.5 / 7), strict=True):
        assert line.count("█") == pytest.approx(share * full, abs=1)


@pytest.mark.parametrize(("ratio", "colour"), [(0.5, "32m"), (0.9, "33m"), (1.25, "31m")])
def test_the_bar_is_green_below_the_limit_yellow_near_it_and_red_beyond(ratio: float, colour: str):
    panel = CurvaturePanel()
    panel.observe(1, observation(7.0, ratio=ratio))
    shown = lines(panel, 60, force_terminal=True, color_system="standard", _environ={})
    assert colour in shown[3]


def test_signs_have_colours_and_values_below_their_residuals_are_dim():
    panel = CurvaturePanel()
    panel.observe(1, observation(3.0, -2.0, 0.05))
    shown = lines(panel, 60, force_terminal=True, color_system="standard", _environ={})
    assert "\x1b[36m" in shown[3]
    assert "\x1b[35m" in shown[4]
    assert "\x1b[2;36m" in shown[5]


def test_without_a_limit_there_is_no_line_for_it():
    panel = CurvaturePanel()
    panel.observe(1, observation(3.0))
    assert not any("limit" in line for line in lines(panel, 60))


def test_before_anything_was_seen_and_with_values_that_are_not_finite_it_can_be_drawn():
    panel = CurvaturePanel()
    assert "no probe yet" in lines(panel, 60)[0]
    panel.loss(math.nan)
    panel.observe(1, observation())
    panel.observe(2, observation(math.inf, 1.0, ratio=math.nan))
    assert {len(line) for line in lines(panel, 60)} == {60}
    assert {len(line) for line in lines(panel, 20)} <= {20}
