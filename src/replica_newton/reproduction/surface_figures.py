"""Figure 1 of Arnold and Wang (2017), still and moving: ways over a saddle, a plateau and a ravine."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import numpy.typing
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

from replica_newton.files import replace_file
from replica_newton.report.style import style
from replica_newton.reproduction.surface_methods import METHODS, TOLERANCE, approach
from replica_newton.reproduction.surfaces import SURFACES, Surface

FloatArray: TypeAlias = numpy.typing.NDArray[numpy.float64]

FRAMES = 84
"""Frames of the animation in which methods move."""

_FRAME_DPI = 90
_FRAME_MILLISECONDS = 90
_LAST_MILLISECONDS = 2500
_RESOLUTION = 161
_PALETTE = 128
_SLOW_STEPS = 6.0
_LOWEST = TOLERANCE / 8.0
# Of the seeds of the comparison the one with the median number of steps, where they differ most: M = 3 in the ravine.
_SEED = 2
_COLOURS = LinearSegmentedColormap.from_list("heights", ["#dfe8ee", "#f1f5f7", "#ffffff"])
_MARK_SIZES = {"o": 7.0, "*": 12.0, "x": 8.0}
_DASHES = (0, (4.0, 2.0))


@dataclass(frozen=True)
class _Look:
    """Line of a method: Okabe and Ito's colours; exact second-order methods are wide and pale below the replicas'."""

    colour: str
    marker: str
    width: float = 1.7
    dashes: Any = "-"
    markersize: float = 4.5


_LOOKS: Mapping[str, _Look] = {
    "newton": _Look("#56B4E9", "", 6.0),
    "saddle-free": _Look("#E69F00", "", 6.0),
    "sgd": _Look("#000000", "o"),
    "momentum": _Look("#009E73", "s", dashes=(0, (1.2, 1.2))),
    "adam": _Look("#CC79A7", "D", dashes=(0, (6.0, 1.5))),
    "paper-3": _Look("#0072B2", "^", dashes=_DASHES, markersize=5.5),
    "saddle-free-3": _Look("#D55E00", "v", dashes=_DASHES, markersize=5.5),
    "saddle-free-8": _Look("#8A3B00", "P", markersize=5.5),
}
# By columns of the legend: first order, replicas' and exact step of either kind.
_LEGEND = ("sgd", "momentum", "adam", "newton", "paper-3", "", "saddle-free", "saddle-free-3", "saddle-free-8")


@dataclass(frozen=True)
class _Way:
    """A trajectory up to its arrival: its points, `(steps + 1, 2)`, and heights above the minimum, `(steps + 1,)`."""

    points: FloatArray
    heights: FloatArray
    arrived: bool


def surfaces_figure() -> Figure:
    """Figure with the ways over the three surfaces, and the height above the minimum against steps.

    One seed of the noise; first-order methods at `Surface.rates`. Ways end in a dot where they arrive, and in a cross
    where they do not within the budget, at the saddle for instance.

    Returns:
        The figure, which belongs to no window and to no backend.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, figure 1.
    """
    with style():
        figure = Figure(figsize=(10, 7.4), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
        maps, curves = figure.subplots(2, 3, height_ratios=(1.15, 1.0))
        for surface, above, below in zip(SURFACES.values(), maps, curves, strict=True):
            ways = _ways(surface.name)
            _draw_map(above, surface)
            _prepare_curves(below, surface)
            for name, way in ways.items():
                for axes, x, y in _coordinates(above, below, way):
                    _draw_way(axes, x, y, name, arrived=way.arrived)
        curves[0].set_ylabel("height above the minimum")
        _add_legend(figure)
    return figure


def save_animation(path: Path, *, frames: int = FRAMES) -> None:
    """Animated GIF of the ways over the three surfaces, about ten seconds, without end.

    All methods take their steps at the same time, slowly at first and ever faster: the second-order methods need some
    ten steps and SGD hundreds. Those that have arrived wait in a dot; the cross is the end of the budget.

    Args:
        path: File to write; its folder is created when it is missing.
        frames: Number of frames in which methods move.

    Raises:
        ValueError: if `frames` is less than 2.
    """
    if frames < 2:
        raise ValueError(f"{frames=} must be >= 2")
    with style():
        pictures = _pictures(frames)
    # One palette for all frames, without dither, so that what stands still costs nothing.
    palette = pictures[-1].quantize(_PALETTE, dither=Image.Dither.NONE)
    first, *others = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    gif = io.BytesIO()
    durations = [*[_FRAME_MILLISECONDS] * (frames - 1), _LAST_MILLISECONDS]
    first.save(gif, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
    replace_file(path, gif.getvalue())


def _pictures(frames: int) -> list[Image.Image]:
    """Frames of the animation. What does not move is drawn once: three maps and a legend take longer than the ways."""
    figure = Figure(figsize=(10, 4.7), dpi=_FRAME_DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib's canvas has no types
    moving = []
    for surface, axes in zip(SURFACES.values(), figure.subplots(1, 3), strict=True):
        _draw_map(axes, surface)
        for name, way in _ways(surface.name).items():
            line, head = _line(name, [], []), _head(name, *way.points[0], arrived=True)
            line.set(marker="")
            for mark in (line, head):
                mark.set_animated(True)
                axes.add_line(mark)
            moving.append((way, line, head))
    moving.sort(key=lambda entry: entry[1].get_zorder())
    counter = figure.text(0.015, 0.03, "", fontsize=11, animated=True)
    _add_legend(figure)
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)
    longest = max(len(way.points) for way, _, _ in moving) - 1
    pictures = []
    for progress in numpy.linspace(0.0, 1.0, frames):
        time = (1.0 + longest / _SLOW_STEPS) ** progress * _SLOW_STEPS - _SLOW_STEPS
        for way, line, head in moving:
            trail = _until(way.points, time)
            line.set_data(*trail.T)
            head.set_data(*trail[-1:].T)
            if not way.arrived and time >= len(way.points) - 1:
                head.set(marker="X", markersize=10.0)
        counter.set_text(f"step {round(time)}")
        canvas.restore_region(background)
        artists: list[Artist] = [*(line for _, line, _ in moving), *(head for _, _, head in moving), counter]
        for artist in artists:
            figure.draw_artist(artist)
        pictures.append(Image.fromarray(numpy.asarray(canvas.buffer_rgba())[..., :3].copy()))
    return pictures


def _until(points: FloatArray, time: float) -> FloatArray:
    """Points up to a time in steps, the last one between two of them."""
    whole = min(int(time), len(points) - 1)
    rest = min(time - whole, 1.0)
    following = points[min(whole + 1, len(points) - 1)]
    return numpy.vstack((points[: whole + 1], (1.0 - rest) * points[whole] + rest * following))


@cache
def _ways(name: str) -> dict[str, _Way]:
    """Ways of all methods over a surface, those at the bottom first."""
    surface = SURFACES[name]
    ways = {}
    for method in (METHODS[name] for name in _LOOKS):
        points, arrived = approach(surface, method, seed=_SEED)
        heights = surface.function(points) - surface.minimum
        ways[method.name] = _Way(points.numpy(), heights.numpy(), arrived)
    return ways


def _draw_map(axes: Axes, surface: Surface) -> None:
    """Contours of a surface, its start, its minima and its saddles."""
    (left, right), (bottom, top) = surface.limits
    x, y = torch.meshgrid(
        torch.linspace(left, right, _RESOLUTION, dtype=torch.float64),
        torch.linspace(bottom, top, _RESOLUTION, dtype=torch.float64),
        indexing="xy",
    )
    heights = (surface.function(torch.stack((x, y), dim=-1)) - surface.minimum).numpy()
    # Colours by the number of the contour, not by height: the flat parts keep their shades.
    ranks = numpy.interp(heights, (0.0, *surface.levels), numpy.arange(len(surface.levels) + 1))
    axes.contourf(x, y, ranks, levels=numpy.arange(len(surface.levels) + 1), cmap=_COLOURS, extend="max")
    axes.contour(x, y, heights, levels=surface.levels, colors="#b9c4cc", linewidths=0.6)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.grid(visible=False)
    axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{surface.name}\n{surface.lesson}", fontsize=11)
    marks = [(surface.start, "o", "start"), *((point, "*", "minimum") for point in surface.minima)]
    marks += [(point, "x", "saddle") for point in surface.saddles]
    for point, marker, text in marks:
        axes.plot(*point, marker, color="#333333", markerfacecolor="white", markersize=_MARK_SIZES[marker], zorder=9)
        beside = text == "saddle"
        axes.annotate(
            text,
            point,
            (-8.0, -25.0) if beside else (0.0, 8.0),
            textcoords="offset points",
            ha="right" if beside else "center",
            fontsize=9.5,
            color="#333333",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=10,
        )


def _prepare_curves(axes: Axes, surface: Surface) -> None:
    """Logarithmic axes for heights against steps, from the start to the budget."""
    top = float(surface.function(torch.tensor(surface.start, dtype=torch.float64))) - surface.minimum
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.35)
    axes.set_yscale("log", nonpositive="clip")
    axes.set(xlabel="steps", xlim=(0.0, 1.15 * surface.budget), ylim=(0.7 * _LOWEST, 2.5 * top))
    axes.set_xticks([0, 1, 10, 100])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axhline(TOLERANCE, color="#808080", linewidth=1.0, linestyle=":")
    axes.annotate("arrived", (0.06, TOLERANCE), (0.0, -3.0), textcoords="offset points", va="top", fontsize=9)


def _coordinates(above: Axes, below: Axes, way: _Way) -> list[tuple[Axes, FloatArray, FloatArray]]:
    """What of a way is drawn in either panel."""
    steps = numpy.arange(len(way.heights), dtype=numpy.float64)
    return [(above, way.points[:, 0], way.points[:, 1]), (below, steps, way.heights)]


def _draw_way(axes: Axes, x: FloatArray, y: FloatArray, name: str, *, arrived: bool) -> None:
    """Line of a way and the mark at its end."""
    line = _line(name, x, y)
    axes.add_line(line)
    # On the frame where the end is below it: only the axes with heights have a logarithmic scale.
    end = max(y[-1], _LOWEST) if axes.get_yscale() == "log" else y[-1]
    axes.add_line(_head(name, x[-1], end, arrived=arrived))


def _line(name: str, x: Sequence[float] | FloatArray, y: Sequence[float] | FloatArray) -> Line2D:
    """Line of a method, with markers at some of the steps."""
    look = _LOOKS[name]
    wide = look.width > 3.0
    return Line2D(
        x,
        y,
        color=look.colour,
        linewidth=look.width,
        linestyle=look.dashes,
        marker=look.marker,
        markersize=look.markersize,
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=1 if len(x) < 40 else 10,
        alpha=0.55 if wide else 1.0,
        label=METHODS[name].label,
        solid_capstyle="round",
        zorder=3 if wide else 4,
    )


def _head(name: str, x: float, y: float, *, arrived: bool) -> Line2D:
    """Mark of a method at one point: a dot, or a cross where a way ends without arrival."""
    return Line2D(
        [x],
        [y],
        color=_LOOKS[name].colour,
        linestyle="none",
        marker="o" if arrived else "X",
        markersize=7.0 if arrived else 10.0,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=8,
    )


def _add_legend(figure: Figure) -> None:
    """Shared legend below the panels."""
    entries = [_line(name, [], []) if name else Line2D([], [], linestyle="none", label="") for name in _LEGEND]
    figure.legend(handles=entries, loc="outside lower center", ncols=3, frameon=False, handlelength=3.2)
