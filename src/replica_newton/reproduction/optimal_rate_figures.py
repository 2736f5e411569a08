"""The figure of LeCun's optimal rate: loss after a fixed number of steps against the rate, in units of 1/λ_max."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from replica_newton.report.formats import format_count
from replica_newton.report.style import style
from replica_newton.report.summary import dataset_name
from replica_newton.reproduction.optimal_rate import SETTINGS

# Okabe & Ito, "Color Universal Design" (2008); markers tell the lines apart without colour.
_LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
_SHARPNESS = "λ$_\\mathrm{max}$"
_LIMITS = {1.0: ("-", f"1/{_SHARPNESS}"), 2.0: ("--", f"2/{_SHARPNESS}")}
_TITLES = {"full_batch": "Gradient descent, all {samples:,} samples", "minibatch": "SGD, batches of {batch:,} samples"}
_LABEL_HEIGHT = 22  # points above the panels, where the crosses are
_HIGHEST = 2.0  # of the loss relative to its start; above it a run is drawn as a cross


def optimal_rate_figure(measurements: Sequence[dict[str, Any]]) -> Figure:
    """Figure with the loss after a fixed number of steps, relative to its start, against rate · λ_max.

    One panel for each setting and one line a measurement: the median over the seeds, and a band from the smallest to
    the largest value. λ_max is what the replicas measured at the start of the very run, so that 1/λ_max and 2/λ_max
    are the same two vertical lines for all; ticks at the foot are where they are by the exact λ_max. A cross at the top
    is a rate at which the median run ends above twice its start, or is not finite.

    Args:
        measurements: what `measure_optimal_rate` returned, four at most, of the same settings.

    Returns:
        The figure, which belongs to no window and to no backend.

    Raises:
        ValueError: if there is no measurement, or more than four.
    """
    if not 1 <= len(measurements) <= len(_LOOKS):
        raise ValueError(f"there must be 1 to {len(_LOOKS)} measurements, got {len(measurements)}")
    with style():
        figure = Figure(figsize=(10, 5.0), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        figure.suptitle(_title(measurements), fontsize=12.5, parse_math=False)
        panels = figure.subplots(1, len(SETTINGS), sharey=True)
        for axes, setting in zip(panels, SETTINGS, strict=True):
            _prepare(axes, setting, measurements)
            for index, measurement in enumerate(measurements):
                _draw(axes, measurement, setting, index)
        panels[0].set_ylabel("loss at the end / loss at the start")
        _add_legend(figure, measurements)
    return figure


def _title(measurements: Sequence[dict[str, Any]]) -> str:
    """Title that says what is drawn, with the data set where all share it."""
    datasets = {measurement["dataset"] for measurement in measurements}
    where = f" ({dataset_name(datasets.pop())})" if len(datasets) == 1 else ""
    return f"Loss after a fixed number of steps against the rate{where}"


def _name(measurement: dict[str, Any], measurements: Sequence[dict[str, Any]]) -> str:
    """Network of a measurement, and its data set where they differ."""
    activation = str(measurement["activation"]).replace("relu", "ReLU")
    several = len({other["dataset"] for other in measurements}) > 1
    return f"{dataset_name(measurement['dataset'])}, {activation}" if several else f"{activation} network"


def _prepare(axes: Axes, setting: str, measurements: Sequence[dict[str, Any]]) -> None:
    """Scales, labels and the lines that every measurement shares."""
    first = measurements[0]
    steps = f"{first['steps'][setting]} steps"
    axes.set_title(f"{_TITLES[setting].format(**first)}: {steps}", fontsize=11, color="#333333", pad=_LABEL_HEIGHT + 20)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    finite = [value for one in measurements for s in SETTINGS for row in _relative(one, s) for value in row]
    lowest = min((value for value in finite if math.isfinite(value) and value > 0.0), default=0.5)
    low = min(lowest, 0.8) / 1.12
    axes.set_ylim(low, _HIGHEST)
    axes.set_xlim(min(first["multiples"]) / 1.2, max(first["multiples"]) * 1.2)
    axes.set_xlabel(f"rate × {_SHARPNESS}, as measured by the replicas")
    axes.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(-5, 4)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if low < 0.15 else (1, 2, 3, 4, 5, 6, 7, 8, 9)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelleft=True)
    axes.axhline(1.0, color="#808080", linewidth=1.0, zorder=1)
    for multiple, (linestyle, label) in _LIMITS.items():
        axes.axvline(multiple, color="#222222", linestyle=linestyle, linewidth=1.3, zorder=1)
        axes.annotate(
            label,
            (multiple, 1.0),
            (0, _LABEL_HEIGHT),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if multiple == 1.0 else "left",  # they stand close together
        )


def _relative(measurement: dict[str, Any], setting: str) -> list[list[float]]:
    """Relative losses, one row a seed, in the order of the multiples; inf where a run is not finite."""
    return [
        [math.inf if entry["relative"] is None else entry["relative"] for entry in run[setting]]
        for run in measurement["runs"]
    ]


def _draw(axes: Axes, measurement: dict[str, Any], setting: str, index: int) -> None:
    """Median, band, crosses and the exact limits of one measurement."""
    colour, marker = _LOOKS[index]
    x, values = numpy.array(measurement["multiples"]), numpy.array(_relative(measurement, setting))
    middle = numpy.array([statistics.median_high(column) for column in values.T.tolist()])
    if len(values) > 1:
        # Where a seed diverged the band is open upwards.
        top = numpy.minimum(values.max(axis=0), 10 * _HIGHEST)
        axes.fill_between(x, numpy.minimum(values.min(axis=0), top), top, color=colour, alpha=0.16, linewidth=0)
    inside = middle <= _HIGHEST
    # A line that leaves the panel at the top rather than one that stops short of it.
    axes.plot(x, numpy.minimum(middle, 1e3), color=colour, linewidth=1.9, zorder=3)
    axes.plot(x[inside], middle[inside], marker, color=colour, markersize=5.5, zorder=4)
    axes.plot(
        x[~inside],
        # One row of crosses above the other, or those of the last measurement would hide the others.
        numpy.full(int((~inside).sum()), 1.03 + 0.04 * index),
        "x",
        transform=axes.get_xaxis_transform(),
        color=colour,
        markersize=7.5,
        markeredgewidth=2.2,
        clip_on=False,
        zorder=5,
    )
    for run in measurement["runs"]:
        ratio = run["sharpness"]["replicas"]["value"] / run["sharpness"]["exact"]["value"]
        for multiple in _LIMITS:
            axes.axvline(multiple * ratio, 0.0, 0.045, color=colour, linewidth=1.6, zorder=4)


def _add_legend(figure: Figure, measurements: Sequence[dict[str, Any]]) -> None:
    """Legend below the panels: each measurement with its λ_max, and what crosses and ticks are."""
    handles = []
    for measurement, (colour, marker) in zip(measurements, _LOOKS, strict=False):
        found = [run["sharpness"] for run in measurement["runs"]]
        replicas = statistics.median(one["replicas"]["value"] for one in found)
        exact = statistics.median(one["exact"]["value"] for one in found)
        rates = f"{1 / replicas:.3g} by replicas, {1 / exact:.3g} exact"
        label = f"{_name(measurement, measurements)}: {_LIMITS[1.0][1]} = {rates}"
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=5.5, linewidth=1.9, label=label))
    crosses = f"ends above {format_count(_HIGHEST)} × its start, or not finite"
    look: dict[str, Any] = {"linestyle": "none", "color": "#555555"}
    handles += [
        Line2D([], [], marker="x", markersize=8, markeredgewidth=2.2, label=crosses, **look),
        Line2D(
            [],
            [],
            marker="|",
            markersize=9,
            markeredgewidth=1.6,
            label=f"1 and 2 over the exact {_SHARPNESS}",
            **look,
        ),
    ]
    seeds = {len(measurement["runs"]) for measurement in measurements}
    over = f"{seeds.pop()} seeds" if len(seeds) == 1 else "the seeds"
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        title=None if over == "1 seeds" else f"line: median over {over}, band: smallest to largest",
        title_fontproperties={"size": 9.5, "style": "italic"},
    )
