"""The curvature of a run over its steps, as a figure."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from replica_newton.report.style import style

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#808080"
_LINEAR_SHARE = 0.01
"""Of the largest eigenvalue: the scale is linear below it, and logarithmic above."""
_FAR_BEYOND = 5.0
"""Ratio to the limit from which on it is drawn on a logarithmic scale."""
_SMOOTHED = 10


def load_curvature(path: Path) -> list[dict[str, float]]:
    """What the monitor saw, probe by probe.

    Args:
        path: a `curvature.jsonl`.

    Returns:
        `{"step": …, "curvature/sharpness": …, …}` each; what was missing or not finite is left out.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curvature_figure(seen: Sequence[Mapping[str, float]]) -> Figure:
    """Eigenvalues, stability, the share of the gradient that the tracked space holds, and the noise scale, by step.

    Args:
        seen: from `load_curvature`.

    Returns:
        A panel for each that was seen at all, and one for the eigenvalues in any case.
    """
    panels = {
        "curvature/stability_ratio": _draw_stability,
        "curvature/captured_gradient_fraction": _draw_captured,
        "curvature/gradient_noise_scale": _draw_noise,
    }
    drawn = [name for name in panels if any(name in one for one in seen)]
    with style():
        rows = 1 + len(drawn) // 2
        size = (10.0, 3.3 * rows) if drawn else (6.0, 3.6)
        figure = Figure(figsize=size, dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        grid = figure.subplots(rows, 2 if drawn else 1, squeeze=False)
        axes = list(grid.flat)
        _draw_eigenvalues(axes[0], seen)
        for name, panel in zip(drawn, axes[1:], strict=False):
            panels[name](panel, *_series(seen, name))
        for panel in axes[1 + len(drawn) :]:
            panel.remove()
        for panel in axes[: 1 + len(drawn)]:
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _draw_eigenvalues(axes: Axes, seen: Sequence[Mapping[str, float]]) -> None:
    axes.set_title("Hessian eigenvalues", fontsize=11)
    ranks = [i for i in range(1, 1 + max(map(len, seen))) if any(f"curvature/eigenvalue_{i}" in one for one in seen)]
    values = []
    for i in reversed(ranks):
        steps, theta = _series(seen, f"curvature/eigenvalue_{i}")
        values += theta
        axes.plot(steps, theta, ".", color=_GREY, markersize=3, alpha=0.7, label="tracked" if i == ranks[0] else None)
    steps, sharpness = _series(seen, "curvature/sharpness")
    axes.plot(steps, sharpness, color=_BLUE, linewidth=1.8, label="sharpness (largest)")
    axes.axhline(0.0, color="#000000", linewidth=0.8)
    largest = max(map(abs, values + sharpness), default=1.0)
    axes.set_yscale("symlog", linthresh=_LINEAR_SHARE * largest or 1.0)
    if sharpness:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.6, "no sweep of all directions has ended yet", ha="center", transform=axes.transAxes)


def _draw_stability(axes: Axes, steps: list[float], ratios: list[float]) -> None:
    axes.set_title("curvature over the largest that is stable", fontsize=11)
    axes.plot(steps, ratios, color=_BLUE, linewidth=1.5)
    axes.axhline(1.0, color=_ORANGE, linewidth=1.4, linestyle=(0, (4, 2)), label="edge of stability")
    if max(ratios) > _FAR_BEYOND:
        axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(bottom=min(0.0, *ratios), top=1.1 * max(1.0, *ratios))
    axes.legend(frameon=False, fontsize=9)


def _draw_captured(axes: Axes, steps: list[float], shares: list[float]) -> None:
    axes.set_title("share of the squared gradient in the tracked space", fontsize=11)
    axes.plot(steps, shares, color=_BLUE, linewidth=1.5)
    axes.set_ylim(0.0, 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_noise(axes: Axes, steps: list[float], scales: list[float]) -> None:
    axes.set_title("gradient noise scale, samples", fontsize=11)
    axes.plot(steps, scales, ".", color=_GREY, markersize=4, alpha=0.7)
    if len(scales) >= _SMOOTHED:
        window = numpy.ones(_SMOOTHED) / _SMOOTHED
        smooth = numpy.exp(numpy.convolve(numpy.log(scales), window, mode="valid"))
        axes.plot(steps[_SMOOTHED - 1 :], smooth, color=_BLUE, linewidth=1.5, label=f"geometric mean of {_SMOOTHED}")
        axes.legend(frameon=False, fontsize=9)
    axes.set_yscale("log")


def _series(seen: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one number, where it is known."""
    known = [(one["step"], one[name]) for one in seen if math.isfinite(one.get(name, math.nan))]
    return [step for step, _ in known], [value for _, value in known]
