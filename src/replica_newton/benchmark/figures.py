"""Figures of the benchmark: loss against gradient evaluations and against time, and final loss against the rate."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from replica_newton.benchmark.optimizers import METHODS, OURS
from replica_newton.benchmark.plan import Entry
from replica_newton.benchmark.run import Record
from replica_newton.benchmark.tasks import TASKS
from replica_newton.report.colours import LINE_HUES
from replica_newton.report.formats import format_count, format_nll
from replica_newton.report.style import style

_OURS_HUE = "#D55E00"
_COLUMNS = 3
_HIGHEST_SHOWN = 1.15
"""Of the loss that a panel's first points have: what diverges leaves the panel."""

Curves = Mapping[str, Mapping[str, Record]]
"""By task, by method: the run of the median seed at the method's best rate."""


def convergence_figure(curves: Curves) -> Figure:
    """Training NLL against gradient evaluations.

    Args:
        curves: what is drawn.

    Returns:
        One panel for each task.
    """
    return _curves_figure(curves, lambda point: float(point[0]), "gradient evaluations (samples)", format_count)


def time_figure(curves: Curves) -> Figure:
    """Training NLL against seconds on one processor.

    Args:
        curves: what is drawn.

    Returns:
        One panel for each task; the axis of time is logarithmic.
    """
    return _curves_figure(curves, lambda point: point[1], "seconds on one processor", "{:g}".format, log=True)


def rates_figure(entries: Mapping[str, Mapping[str, Entry]]) -> Figure:
    """Final training NLL against the learning rate, median over the seeds that were run.

    Args:
        entries: by task, by method.

    Returns:
        One panel for each task; a filled dot is the best rate, methods without a grid are horizontal lines.
    """
    with style():
        figure, panels = _panels(entries)
        for axes, (task, rows) in zip(panels, entries.items(), strict=False):
            shown: list[float] = []
            for method, entry in rows.items():
                finals = {rate: median(values) for rate, values in entry.finals.items()}
                line = _line(method)
                if not METHODS[method].tuned:
                    axes.axhline(finals[entry.rate], **line)
                    shown.append(finals[entry.rate])
                    continue
                axes.plot(list(finals), [_drawn(value) for value in finals.values()], **line)
                axes.plot(entry.rate, _drawn(finals[entry.rate]), "o", color=line["color"], markersize=4.5)
                shown += finals.values()
            axes.set_xscale("log")
            _title(axes, task, "learning rate", "final training NLL")
            _logarithmic_losses(axes, [value for value in shown if math.isfinite(value)])
        _legend(figure, entries)
    return figure


def _curves_figure(
    curves: Curves,
    place: Callable[[tuple[int, float, float]], float],
    label: str,
    text: Callable[[float], str],
    *,
    log: bool = False,
) -> Figure:
    with style():
        figure, panels = _panels(curves)
        for axes, (task, runs) in zip(panels, curves.items(), strict=False):
            firsts, shown = [], []
            for method, record in runs.items():
                points = [point for point in record.curve if math.isfinite(point[2])]
                if points:
                    axes.plot(
                        [place(point) for point in points], [_drawn(point[2]) for point in points], **_line(method)
                    )
                    firsts.append(points[0][2])
                    shown += [point[2] for point in points]
            if log:
                axes.set_xscale("log")
            _title(axes, task, label)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
            top = _HIGHEST_SHOWN * max(firsts, default=1.0)
            _logarithmic_losses(axes, [value for value in shown if value <= top])
        _legend(figure, curves)
    return figure


def _panels(tasks: Mapping[str, object]) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(max(4.1 * columns, 6.4), 3.4 * rows + 1.0), dpi=100, layout=layout)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    return figure, panels


def _title(axes: Axes, task: str, label: str, losses: str = "training NLL") -> None:
    axes.set_title(TASKS[task].label, fontsize=10.5)
    axes.set_xlabel(label)
    axes.set_ylabel(losses)


def _logarithmic_losses(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis that holds the values, with plain numbers at 1, 2 and 5."""
    positive = [value for value in values if value > 0.0]
    if not positive:
        return
    axes.set_yscale("log")
    low, high = min(positive), max(positive)
    axes.set_ylim(low / 1.08, high * 1.08)
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.5 else "all")
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_nll(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _drawn(value: float) -> float:
    """A log axis has no place for what is not positive or not finite."""
    return value if math.isfinite(value) and value > 0.0 else math.nan


def _legend(figure: Figure, tasks: Mapping[str, Mapping[str, object]]) -> None:
    methods = [name for name in METHODS if any(name in rows for rows in tasks.values())]
    handles = [Line2D([], [], label=METHODS[name].label, **_line(name)) for name in methods]
    columns = 5 if len(tasks) >= _COLUMNS else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)


def _line(method: str) -> dict[str, Any]:
    """Ours is thick; first-order peers have solid lines, second-order ones dashed, six hues each."""
    return _LINES.get(method, {"color": "#808080", "linestyle": ":", "linewidth": 1.2})


def _lines() -> Iterator[tuple[str, dict[str, Any]]]:
    hues = [hue for hue in LINE_HUES if hue != _OURS_HUE]
    for family, dash in (("first-order", "-"), ("second-order", (0, (4, 1.6)))):
        names = [name for name, method in METHODS.items() if method.family == family]
        for name, hue in zip(names, hues, strict=False):  # a seventh would be grey
            yield name, {"color": hue, "linestyle": dash, "linewidth": 1.3}
    # Nearly the same as Adam, which it would hide.
    yield "adamw", {"color": LINE_HUES[3], "linestyle": (0, (1.2, 1.6)), "linewidth": 1.8, "zorder": 3}
    yield OURS, {"color": _OURS_HUE, "linestyle": "-", "linewidth": 2.8, "zorder": 5}


_LINES = dict(_lines())
