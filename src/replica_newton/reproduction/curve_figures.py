"""Figures of training curves: ours beside the poster's, all panels, the peers, the search, the plateau."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from replica_newton.report.formats import format_count
from replica_newton.report.style import style
from replica_newton.reproduction.design import ACTIVATIONS, RATES, Candidate
from replica_newton.reproduction.experiment import Record
from replica_newton.reproduction.poster import Curves, poster_curves
from replica_newton.reproduction.readings import Reading, reading_named

DATASET_NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
ACTIVATION_NAMES = {"relu": "ReLU", "tanh": "tanh"}
# Okabe and Ito (2008); SGD is black.
_COLOURS = {1: "#000000", 2: "#D55E00", 4: "#E69F00", 6: "#56B4E9", 8: "#0072B2"}
_MARKERS = {1: "o", 2: "s", 4: "^", 6: "v", 8: "D"}
_PEER_STYLES = {
    "sgd": ("#000000", "o"),
    "momentum": ("#009E73", "s"),
    "adam": ("#CC79A7", "D"),
    "sharpness-rate": ("#56B4E9", "v"),
    "replica-newton": ("#D55E00", "P"),
    "literal": ("#E69F00", "X"),
    "closest": ("#0072B2", "^"),
}
_TOP_NLL = 3.0


def poster_figure(rows: Mapping[str, Mapping[str, Curves]]) -> Figure:
    """Our curves (lines) and the poster's points (dots) on the same axes.

    Args:
        rows: by a row's title, by data set, our curves for SGD (under 1) and M = 2, 4, 6, 8; one that diverged ends
            in nan.

    Returns:
        One row of panels for each title, one column for each data set.
    """
    datasets = list(next(iter(rows.values())))
    with style():
        figure = Figure(figsize=(5.2 * len(datasets), 3.7 * len(rows) + 0.5), dpi=100, layout=_layout())
        panels = figure.subplots(len(rows), len(datasets), squeeze=False)
        for axes, ((title, curves), dataset) in zip(panels.flat, product(rows.items(), datasets), strict=True):
            axes.set_title(f"{DATASET_NAMES[dataset]}: {title}", fontsize=10.5)
            for M, values in poster_curves(dataset).items():
                axes.plot(range(1, len(values) + 1), values, ".", color=_COLOURS[M], markersize=3.2, alpha=0.75)
            _draw_curves(axes, curves[dataset])
            shown = [value for values in poster_curves(dataset).values() for value in values]
            shown += [value for values in curves[dataset].values() for value in values if value < _TOP_NLL]
            axes.set_ylim(min(shown) * 0.9, max(2.35, *shown) * 1.02)
            axes.set(xlabel="epoch", ylabel="training NLL")
        handles = [_line(M) for M in _COLOURS]
        handles.append(Line2D([], [], linestyle="none", marker=".", color="#666666", label="poster's points"))
        handles.append(Line2D([], [], color="#666666", label="ours"))
        handles.append(Line2D([], [], linestyle="none", marker="x", color="#666666", label="diverged"))
        columns = len(handles) if len(datasets) > 1 else len(handles) // 2
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)
    return figure


def panels_figure(panels: Mapping[tuple[str, str, float], Curves]) -> Figure:
    """Figure 2 at both rates and with both activations, on every data set.

    Args:
        panels: by data set, activation and rate: our curves, as far as they have been run.

    Returns:
        One row of four panels for each data set.
    """
    datasets = list(dict.fromkeys(dataset for dataset, _, _ in panels))
    combinations = list(product(ACTIVATIONS, RATES))
    with style():
        figure = Figure(figsize=(11.5, 2.9 * len(datasets) + 0.5), dpi=100, layout=_layout())
        grid = figure.subplots(len(datasets), len(combinations), squeeze=False, sharey="row")
        for axes, (dataset, (activation, rate)) in zip(grid.flat, product(datasets, combinations), strict=True):
            axes.set_title(f"{DATASET_NAMES[dataset]}, {ACTIVATION_NAMES[activation]}, α = {rate:g}", fontsize=10)
            curves = panels[dataset, activation, rate]
            _draw_curves(axes, curves)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for row, dataset in zip(grid, datasets, strict=True):
            values = [
                value
                for key, curves in panels.items()
                for curve in curves.values()
                for value in curve
                if key[0] == dataset and 0.0 < value < _TOP_NLL
            ]
            row[0].set_ylim(min(values, default=1.0) * 0.95, max(2.35, *values) * 1.02)
            row[0].set_ylabel("training NLL")
        figure.legend(
            handles=[_line(M) for M in _COLOURS], loc="outside lower center", ncols=5, frameon=False, fontsize=9.5
        )
    return figure


def peers_figure(curves: Mapping[str, Mapping[str, tuple[str, Record]]]) -> Figure:
    """Training NLL against gradient evaluations, with what the paper lacks: first-order methods at their best rate.

    Args:
        curves: by data set, by role (a key of the styles: "sgd", …, "closest"): label and run.

    Returns:
        One panel for each data set.
    """
    with style():
        figure = Figure(figsize=(5.4 * len(curves), 5.2), dpi=100, layout=_layout())
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, (dataset, runs) in zip(panels, curves.items(), strict=True):
            axes.set_title(DATASET_NAMES[dataset], fontsize=11)
            for role, (label, record) in runs.items():
                colour, marker = _PEER_STYLES[role]
                nll = numpy.array(record.train_nll)
                evaluations = numpy.array(record.gradient_evaluations, dtype=float)
                every = max(1, len(nll) // 10)
                axes.plot(evaluations, nll, color=colour, marker=marker, markevery=every, markersize=4.5, label=label)
            least = min(record.gradient_evaluations[0] for _, record in runs.values() if record.gradient_evaluations)
            poster = poster_curves(dataset)[8]
            at = least * numpy.arange(1, len(poster) + 1)
            axes.plot(at, poster, ".", color="#666666", markersize=3, label="poster, M = 8")
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10.0 * low else (1, 1.2, 1.5, 2, 3, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
            axes.set(xlabel="gradient evaluations (samples)", ylabel="training NLL")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
    return figure


def search_figure(distances: Mapping[Candidate, float], no_effect: float) -> Figure:
    """Distance to the poster of every reading, spread out by the value of each thing that is left open.

    Args:
        distances: by reading and rate.
        no_effect: distance of a reading whose curves all equal SGD's.

    Returns:
        One panel for each thing; every reading is a point in each of them. The bar is the median.
    """
    things: dict[str, Any] = {
        "initial weights": lambda one: reading_named(one.reading).start,
        "replicas stand": lambda one: reading_named(one.reading).parting,
        "secants' data": lambda one: reading_named(one.reading).data,
        "z_⊥": lambda one: reading_named(one.reading).orthogonal,
        "σ_i": lambda one: reading_named(one.reading).divisor,
        "α multiplies": lambda one: reading_named(one.reading).damped,
        "rate": lambda one: f"{one.rate:g}",
    }
    values = {thing: list(dict.fromkeys(map(value_of, distances))) for thing, value_of in things.items()}
    jitter = numpy.random.default_rng(0)
    with style():
        figure = Figure(figsize=(11.5, 4.6), dpi=100, layout=_layout())
        widths = [len(found) for found in values.values()]
        panels = figure.subplots(1, len(things), sharey=True, width_ratios=widths)
        for axes, (thing, found) in zip(panels, values.items(), strict=True):
            for x, value in enumerate(found):
                points = [distance for one, distance in distances.items() if things[thing](one) == value]
                offsets = jitter.uniform(-0.28, 0.28, len(points))
                axes.plot(x + offsets, points, ".", color="#0072B2", markersize=4, alpha=0.55)
                axes.hlines(numpy.median(points), x - 0.35, x + 0.35, color="#D55E00", linewidth=2)
            axes.set_title(thing, fontsize=10.5, parse_math=False)
            axes.set_xticks(range(len(found)), found, rotation=40, ha="right", fontsize=9)
            axes.set_xlim(-0.6, len(found) - 0.4)
            axes.grid(visible=False, axis="x")
            axes.axhline(no_effect, color="#000000", linewidth=1.0, linestyle=(0, (4, 2)), zorder=1.5)
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].yaxis.set_minor_locator(NullLocator())
        panels[0].set_ylim(min(no_effect, *distances.values()) / 1.15, max(no_effect, *distances.values()) * 1.1)
        panels[0].set_ylabel("distance to the poster")
        handles = [
            Line2D([], [], linestyle="none", marker=".", color="#0072B2", label="a reading at a rate"),
            Line2D([], [], color="#D55E00", linewidth=2, label="median"),
            Line2D([], [], color="#000000", linewidth=1.0, linestyle=(0, (4, 2)), label="no effect at all"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    return figure


def plateau_figure(steps: Mapping[str, Sequence[int | None]], limit: int) -> Figure:
    """Steps until the network left its initial plateau.

    Args:
        steps: by label, one value a seed; None where it never left.
        limit: number of steps that were run.

    Returns:
        One row for each label; an arrow where the plateau was not left.
    """
    with style():
        figure = Figure(figsize=(8.6, 0.42 * len(steps) + 1.2), dpi=100, layout=_layout())
        axes = figure.subplots()
        for y, (_, values) in enumerate(steps.items()):
            left = [value for value in values if value is not None]
            axes.plot(left, [y] * len(left), "o", color="#0072B2", markersize=6, alpha=0.8)
            if len(left) < len(values):
                # Beyond the limit, where no run has left.
                axes.plot([limit * 1.2], [y], ">", color="#D55E00", markersize=8)
                axes.text(
                    limit * 1.4,
                    y,
                    f"{len(values) - len(left)} of {len(values)} never",
                    va="center",
                    fontsize=9,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
                )
        axes.set_yticks(range(len(steps)), list(steps), parse_math=False)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.axvline(limit, color="#808080", linewidth=1.0, linestyle=(0, (4, 2)), zorder=1.5)
        axes.set_xlim(right=limit * 3.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        axes.set_xlabel("steps on the plateau; dashed: the longest run")
    return figure


def reading_in_words(reading: Reading) -> str:
    """A reading in a few words, its usual values left out.

    Args:
        reading: the reading.

    Returns:
        Such as "own directions, common data, z_⊥ dropped".
    """
    words = {
        "local": "last local step kept",
        "summed": "local steps summed",
        "fixed": "distances fixed",
        "own": "own direction each",
        "reset": "reset to the mean",
    }[reading.parting]
    words += ", own shards" if reading.data == "own" else ", common data"
    words += ", different starts" if reading.start == "different" else ""
    words += ", z_⊥ dropped" if reading.orthogonal == "dropped" else ""
    words += ", σ² for σ" if reading.divisor == "eigenvalue" else ""
    return words + (", α on z_⊥ alone" if reading.damped == "orthogonal" else "")


def _draw_curves(axes: Axes, curves: Curves) -> None:
    for M, values in curves.items():
        nll = numpy.array(values, dtype=float)
        epochs = numpy.arange(1, len(nll) + 1)
        shown = numpy.where(nll < _TOP_NLL, nll, numpy.nan)
        axes.plot(epochs, shown, color=_COLOURS[M], marker=_MARKERS[M], markevery=(4, 10), markersize=4, linewidth=1.5)
        if len(nll) and not math.isfinite(nll[-1]):
            last = numpy.flatnonzero(numpy.isfinite(shown))
            x, y = (epochs[last[-1]], shown[last[-1]]) if last.size else (1, 2.3)
            axes.plot(x, y, "x", color=_COLOURS[M], markersize=9, markeredgewidth=2, clip_on=False)


def _line(M: int) -> Line2D:
    label = "SGD" if M == 1 else f"M = {M}"
    return Line2D([], [], color=_COLOURS[M], marker=_MARKERS[M], markersize=4, label=label)


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
