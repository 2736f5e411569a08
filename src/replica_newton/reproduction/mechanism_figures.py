"""The figure of the mechanism: what the secants hold, one panel a quantity."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from replica_newton.report.style import settle, style


class _Look(NamedTuple):
    """How one kind of replicas looks in all panels: Okabe and Ito's colours, and a marker of its own."""

    colour: str
    marker: str
    label: str


_OWN = _Look("#D55E00", "o", "own shards")
_COMMON = _Look("#0072B2", "s", "common shard")
_RANDOM = _Look("#009E73", "^", "random")
_EXACT = _Look("#000000", "D", "exact")
_POWER = _Look("#CC79A7", "D", "power iteration")
_EARLY = _Look("#56B4E9", "v", "early")
_GREY = "#707070"
_NOTE = 8.0


def mechanism_figure(measurements: Mapping[str, Any]) -> Figure:
    """Figure with one panel for each quantity that `measure_mechanism` gives, and two for the signal.

    Lines are medians, bands go from the smallest to the largest value over batches (over seeds for the overshoot).

    Args:
        measurements: what `measure_mechanism` returned, or the same read back from JSON.

    Returns:
        The figure, which belongs to no window and to no backend.
    """
    task = measurements["task"]
    with style():
        figure = Figure(figsize=(10, 8.4), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1))
        network = task["activation"].replace("relu", "ReLU")
        figure.suptitle(
            f"{task['dataset'].replace('mnist', 'MNIST')}: {network} network with {task['parameters']:,} parameters "
            f"after {task['steps']} steps of SGD",
            fontsize=12.5,
            parse_math=False,
        )
        panels: Sequence[tuple[str, Callable[[Axes, Mapping[str, Any]], None]]] = (
            ("Signal to noise of G against α", _draw_against_rate),
            ("Signal to noise against shard size", _draw_against_shard),
            ("Inverse curvature along W v", _draw_inverse_curvature),
            ("Overshoot on quadratics", _draw_overshoot),
            ("Share of the gradient in span(G)", _draw_captured),
            ("Largest Hessian eigenvalues", _draw_spectrum),
        )
        for letter, axes, (title, draw) in zip("abcdef", figure.subplots(2, 3).flat, panels, strict=True):
            axes.set_title(f"{letter}   {title}", loc="left", fontsize=10, fontweight="bold", parse_math=False)
            axes.tick_params(labelsize=9)
            axes.xaxis.label.set_size(9.5)
            axes.yaxis.label.set_size(9.5)
            draw(axes, measurements)
    # The room that a legend below its panel needs depends on the height of the panel: one pass is not enough.
    settle(figure)
    return figure


def _line(axes: Axes, x: Sequence[float], line: Mapping[str, Sequence[float]], look: _Look, **style: Any) -> None:
    """Medians as a line with markers, and the range as a band."""
    middle, low, high = (numpy.array(line[name], float) for name in ("median", "low", "high"))
    axes.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)
    settings = {"label": look.label, "marker": look.marker, "markersize": 4.5, "linewidth": 1.8, **style}
    axes.plot(x, middle, color=look.colour, **settings)


def _legend(axes: Axes, *, columns: int = 1, handles: float = 1.9) -> None:
    """Legend below the panel, where no measurement can lie under it."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.19),
        ncols=columns,
        fontsize=8.5,
        frameon=False,
        borderpad=0.0,
        borderaxespad=0.0,
        columnspacing=1.0,
        handlelength=handles,
        handletextpad=0.5,
        labelspacing=0.3,
    )


def _level(axes: Axes, height: float, text: str, *, on_the_right: bool = False) -> None:
    """Dashed level with its meaning written on it."""
    axes.axhline(height, color=_GREY, linewidth=1.1, linestyle=(0, (4, 2)), zorder=1.5)
    axes.annotate(
        text,
        (0.98 if on_the_right else 0.02, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right" if on_the_right else "left",
        fontsize=_NOTE,
        color=_GREY,
    )


def _powers_of_ten(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_minor_locator(NullLocator())


def _numbers_of(axes: Axes, values: Sequence[int]) -> None:
    """Logarithmic x-axis with a tick for every value."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_against_rate(axes: Axes, measurements: Mapping[str, Any]) -> None:
    of = measurements["signal_against_rate"]
    axes.set(xscale="log", yscale="log", xlabel="step size α of the local steps", ylabel="signal / noise")
    _line(
        axes,
        of["rates"],
        of["early"],
        _EARLY._replace(label=f"first order, after {of['early_step']} steps"),
        linestyle=":",
        markersize=3.5,
    )
    _line(axes, of["rates"], of["linear"], _EXACT._replace(label="first order: H W"), linestyle=":", markersize=3.5)
    _line(axes, of["rates"], of["secant"], _OWN._replace(label="gradient differences"))
    _level(axes, 1.0, "signal = noise")
    largest = max(measurements["spectrum"]["checkpoints"][-1]["eigenvalues"])
    axes.axvline(2 / largest, color=_GREY, linewidth=1.1, linestyle=(0, (1, 1.5)), zorder=1.5)
    axes.annotate(
        "2/λ₁",
        (2 / largest, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 0),
        textcoords="offset points",
        ha="right",
        fontsize=_NOTE,
        color=_GREY,
    )
    _powers_of_ten(axes)
    _legend(axes)


def _draw_against_shard(axes: Axes, measurements: Mapping[str, Any]) -> None:
    of = measurements["signal_against_shard"]
    axes.set(yscale="log", xlabel="samples in a shard", ylabel="signal / noise")
    _numbers_of(axes, of["shards"])
    _line(axes, of["shards"], of["ratio"], _OWN._replace(label=f"local steps, α = {of['rate']:g}"))
    _line(axes, of["shards"], of["fixed"], _COMMON._replace(label="same directions, fixed length"), linestyle="--")
    _level(axes, 1.0, "signal = noise")
    _plain_decimals(axes.yaxis)
    _legend(axes)


def _draw_inverse_curvature(axes: Axes, measurements: Mapping[str, Any]) -> None:
    groups = measurements["inverse_curvature"]["groups"]
    axes.set(xscale="log", yscale="log", xlabel="true: ‖W v‖ / ‖H W v‖", ylabel="as the step takes it: ‖W v‖ / σ")
    axes.axline((1.0, 1.0), (2.0, 2.0), color=_GREY, linewidth=1.2, zorder=1.5, label="taken = true")
    filled: dict[str, bool] = {}
    # Own shards last, on top.
    for group in sorted(groups, key=lambda group: str(group["data"])):
        look = _OWN if group["data"] == "own" else _COMMON
        # The first rate filled, the second hollow.
        colour = "none" if filled.get(group["data"]) else look.colour
        filled[group["data"]] = True
        axes.scatter(
            numpy.array(group["true"], float),
            numpy.array(group["claimed"], float),
            s=17,
            marker=look.marker,
            facecolors=colour,
            edgecolors=look.colour,
            linewidths=0.9,
            alpha=0.85,
            label=f"{look.label}, α = {group['rate']:g}",
        )
    sides = {name: [value for group in groups for value in group[name] if value] for name in ("true", "claimed")}
    rates = [group["rate"] for group in groups]
    axes.set_xlim(min(sides["true"]) / 1.3, max(sides["true"]) * 1.5)
    axes.set_ylim(min(*sides["claimed"], *rates) / 1.4, max(*sides["claimed"], *rates) * 1.8)
    points = [pair for group in groups for pair in zip(group["true"], group["claimed"], strict=True) if all(pair)]
    middle = math.sqrt(math.prod(axes.get_xlim()))
    for rate in dict.fromkeys(rates):
        # The diagonal crosses a level at α.
        near = [true for true, taken in [*points, (rate, rate)] if rate / 1.2 < taken < rate * 1.8]
        to_the_left = sum(true < middle for true in near)
        _level(axes, rate, f"α = {rate:g}", on_the_right=2 * to_the_left > len(near))
    for axis in (axes.xaxis, axes.yaxis):
        _plain_decimals(axis)
    _legend(axes, columns=2, handles=0.8)


def _draw_overshoot(axes: Axes, measurements: Mapping[str, Any]) -> None:
    of = measurements["overshoot"]
    axes.set(yscale="log", xlabel="replicas M", ylabel="curvature step / captured Newton step")
    _numbers_of(axes, of["replicas"])
    groups = [group for group in of["groups"] if group["error"] == "isotropic"]
    size = min(group["size"] for group in groups)
    exponents = list(dict.fromkeys(group["exponent"] for group in groups))
    styles = dict(zip(exponents, cycle(("-", "--", ":")), strict=False))
    looks = {
        "random": _RANDOM._replace(label="random"),
        "local": _OWN._replace(label="local steps"),
        "power": _POWER,
    }
    for group in groups:
        if group["size"] == size:
            look = looks[group["displacements"]]
            style = styles[group["exponent"]]
            label = look.label if style == "-" else f"_{look.label}"
            axes.plot(
                of["replicas"],
                group["captured_length"]["median"],
                color=look.colour,
                marker=look.marker,
                markersize=4.5,
                linewidth=1.8,
                linestyle=style,
                label=label,
            )
    for exponent in exponents:
        axes.plot([], [], color=_GREY, linestyle=styles[exponent], label=f"λᵢ = i⁻{'¹²³'[int(exponent) - 1]}")
    _level(axes, 1.0, "")
    axes.set_ylim(0.7, None)
    _plain_decimals(axes.yaxis)
    _legend(axes, columns=2)


def _plain_decimals(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(
            lambda value, _: numpy.format_float_positional(value, 3, unique=False, trim="-", fractional=False)
        )
    )


def _draw_captured(axes: Axes, measurements: Mapping[str, Any]) -> None:
    of = measurements["captured"]
    axes.set(xlabel="replicas M", ylabel="‖U Uᵀ g‖² / ‖g‖², g on fresh data")
    _numbers_of(axes, of["replicas"])
    axes.plot(
        of["replicas"],
        of["eigenvectors"],
        color=_EXACT.colour,
        marker=_EXACT.marker,
        markersize=4.0,
        linestyle=":",
        linewidth=1.6,
        label="top M−1 eigenvectors of H",
    )
    for kind, look in (("common", _COMMON), ("own", _OWN), ("random", _RANDOM._replace(label="random displacements"))):
        _line(axes, of["replicas"], of[kind]["fresh"], look)
    axes.set_ylim(0.0, None)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(axes)


def _draw_spectrum(axes: Axes, measurements: Mapping[str, Any]) -> None:
    checkpoints = measurements["spectrum"]["checkpoints"]
    axes.set(yscale="log", xlabel="number i of the eigenvalue", ylabel="|λᵢ|")
    looks = (_EARLY, _EXACT)
    for checkpoint, look in zip(checkpoints, looks[-len(checkpoints) :], strict=True):
        values = numpy.array(checkpoint["eigenvalues"], float)
        x = numpy.arange(1, len(values) + 1)
        count = checkpoint["outliers"]
        axes.plot(
            x,
            numpy.abs(values),
            color=look.colour,
            marker=look.marker,
            markersize=4.5,
            linewidth=1.0,
            label=f"step {checkpoint['step']}: gap × {checkpoint['gap']:.2f} after {count}",
        )
        negative = values < 0
        axes.plot(
            x[negative],
            numpy.abs(values[negative]),
            look.marker,
            color=look.colour,
            markersize=4.5,
            markerfacecolor="white",
        )
    axes.grid(visible=False, axis="x")
    for M in (2, 4, 6, 8):
        label = "M − 1 for M = 2, 4, 6, 8" if M == 2 else None
        axes.axvline(M - 1, color=_GREY, linewidth=1.0, linestyle=(0, (4, 2)), zorder=0.5, label=label)
    axes.xaxis.set_major_locator(FixedLocator([1, 5, 10, 15, 20]))
    _plain_decimals(axes.yaxis)
    _legend(axes)
