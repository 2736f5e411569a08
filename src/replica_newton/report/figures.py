"""The convergence figure: training NLL against epochs and against gradient evaluations."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TypeAlias

import numpy
import numpy.typing
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from replica_newton.report.colours import line_colours
from replica_newton.report.formats import format_count
from replica_newton.report.style import save_figure, style
from replica_newton.report.summary import Series, Summary, dataset_name, group_runs

FloatArray: TypeAlias = numpy.typing.NDArray[numpy.float64]

_KNOWN_MARKERS = {"sgd": "o", "momentum": "s", "adam": "D", "paper": "^", "saddle-free": "v"}
_FURTHER_MARKERS = "PX*"
_HEIGHT = 4.5
_LEGEND_LINE = 96
_LEGEND_SAMPLE = 7
_LEGEND_ROWS = 4


def convergence_figure(summary: Summary) -> Figure:
    """Figure with the training NLL (log scale) against epochs, and against gradient evaluations.

    One line for each method and number of replicas, at the learning rate that ends lowest: the median over the seeds,
    and a band from the smallest to the largest value where there are several. A line that diverges ends in a cross.

    Args:
        summary: Content of `summary.json`; incomplete runs are drawn as far as they got.

    Returns:
        The figure, which belongs to no window and to no backend.
    """
    drawn = [series for series in group_runs(summary) if series.best]
    with style():
        figure = Figure(figsize=(10, _HEIGHT), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        figure.suptitle(_title(summary), fontsize=12.5, parse_math=False)
        by_epoch, by_evaluation = figure.subplots(1, 2, sharey=True)
        by_epoch.set(xlabel="epochs", ylabel="training NLL")
        by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_evaluation.set_xlabel("gradient evaluations (samples)")
        by_evaluation.xaxis.set_major_locator(MaxNLocator(6))
        by_evaluation.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        # Shared y-axes share their labels too; the right panel is easier to read with its own.
        by_evaluation.tick_params(labelleft=True)
        limits = _scale_nll(by_epoch, drawn)
        handles = _draw(drawn, by_epoch, by_evaluation, limits)
        if handles:
            _add_legend(figure, drawn, handles)
        else:
            by_epoch.text(0.5, 0.5, "no epoch has finished yet", ha="center", transform=by_epoch.transAxes)
    return figure


def save_convergence(summary: Summary, folder: Path) -> None:
    """Convergence figure as `convergence.png` and `convergence.svg`.

    Args:
        summary: Content of `summary.json`.
        folder: Folder of the two files; it is created when it is missing.
    """
    save_figure(convergence_figure(summary), folder, "convergence")


def _title(summary: Summary) -> str:
    """Title that names the task."""
    task = summary["task"]
    return (
        f"{dataset_name(task['dataset'])}: {task['activation'].replace('relu', 'ReLU')} network with "
        f"{task['parameters']:,} parameters, "
        f"{task['train_samples']:,} samples, batch size {task['batch_size']:,}"
    )


def _scale_nll(axes: Axes, drawn: Sequence[Series]) -> tuple[float, float]:
    """Set up of the logarithmic axis, with tick labels as plain decimals.

    Args:
        axes: Axes to set up.
        drawn: Series that will be drawn. Those that diverged do not stretch the axis, unless there are no others.

    Returns:
        The limits of the axis.
    """
    steady = [series for series in drawn if not series.diverged] or drawn
    values = [value for series in steady for spread in series.nll for value in spread]
    values = [value for value in values if math.isfinite(value) and value > 0]
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    margin = max((high / low) ** 0.05, 1.02)
    low, high = low / margin, high * margin
    axes.set_yscale("log", nonpositive="mask")
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    if decades < 0.7:
        axes.yaxis.set_major_locator(FixedLocator(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)[1:-1]))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3.5 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: numpy.format_float_positional(value, 4, trim="-")))
    return low, high


def _draw(drawn: Sequence[Series], by_epoch: Axes, by_evaluation: Axes, limits: tuple[float, float]) -> list[Line2D]:
    """Lines, bands and crosses of all series in both panels.

    Args:
        drawn: Series to draw.
        by_epoch: Panel against epochs.
        by_evaluation: Panel against gradient evaluations.
        limits: Limits of the NLL axis.

    Returns:
        The lines in the left panel, one a series.
    """
    colours = line_colours((series.method, series.replicas) for series in drawn)
    further = (series.method for series in drawn if series.method not in _KNOWN_MARKERS)
    markers = _KNOWN_MARKERS | dict(zip(dict.fromkeys(further), cycle(_FURTHER_MARKERS), strict=False))
    handles = []
    for series in drawn:
        colour = colours[series.method, series.replicas]
        middle, low, high = numpy.array(series.nll).T
        for axes, x in (
            (by_epoch, numpy.array(series.epochs, float)),
            (by_evaluation, numpy.array(series.gradient_evaluations)),
        ):
            if len(series.seeds) > 1:
                # Where a seed diverged the band is open upwards; where all of them did it ends.
                top = numpy.minimum(high, 10 * limits[1])
                axes.fill_between(x, low, top, where=numpy.isfinite(low), color=colour, alpha=0.16, linewidth=0)
            (line,) = axes.plot(
                x,
                numpy.where(numpy.isfinite(middle), middle, numpy.nan),
                color=colour,
                label=series.label,
                linewidth=1.8,
                marker=markers[series.method],
                markersize=4,
                markevery=max(1, math.ceil(len(x) / 12)),
            )
            end = _end_of_divergence(x, middle, limits[1])
            if end is not None:
                # Not clipped: it often stands on the frame.
                axes.plot(*end, "x", color=colour, markersize=9, markeredgewidth=2.2, clip_on=False)
            if axes is by_epoch:
                handles.append(line)
    return handles


def _end_of_divergence(x: FloatArray, nll: FloatArray, top: float) -> tuple[float, float] | None:
    """Point where a line that diverges leaves the panel, or its last finite point; `None` if it does not diverge."""
    finite = numpy.isfinite(nll)
    if finite.all() or not finite.any():
        return None
    last = int(numpy.flatnonzero(finite)[-1])
    above = numpy.flatnonzero(finite & (nll > top))
    if above.size == 0:
        return float(x[last]), float(nll[last])
    first = int(above[0])
    if first == 0:
        return float(x[0]), top
    # The line is straight on the logarithmic axis.
    height = (math.log(top) - math.log(nll[first - 1])) / (math.log(nll[first]) - math.log(nll[first - 1]))
    return float(x[first - 1] + height * (x[first] - x[first - 1])), top


def _legend_columns(drawn: Sequence[Series]) -> list[list[int]]:
    """Columns of the legend, as positions in `drawn`.

    Args:
        drawn: Series that are drawn.

    Returns:
        The first that fits the width of the figure: one entry a column; a column for each method with several numbers
        of replicas, and one for all other methods; ever fewer columns of equal length.
    """
    count = len(drawn)
    methods = [series.method for series in drawn]
    by_method: dict[str, list[int]] = {}
    for i, method in enumerate(methods):
        by_method.setdefault(method if methods.count(method) > 1 else "", []).append(i)
    grouped = [list(by_method.values())] if max(map(len, by_method.values())) <= _LEGEND_ROWS else []
    even = [[list(range(i, min(i + rows, count))) for i in range(0, count, rows)] for rows in range(1, count + 1)]
    layouts = [even[0], *grouped, *even[1:]]

    def width(columns: list[list[int]]) -> int:
        return sum(max(len(drawn[i].label) for i in column) + _LEGEND_SAMPLE for column in columns)

    return next((layout for layout in layouts if width(layout) <= _LEGEND_LINE), layouts[-1])


def _add_legend(figure: Figure, drawn: Sequence[Series], handles: Sequence[Line2D]) -> None:
    """Shared legend below the panels; the figure grows by the height of its rows."""
    columns = _legend_columns(drawn)
    rows = max(map(len, columns))
    figure.set_figheight(_HEIGHT + 0.25 * rows)
    # Matplotlib fills one column after the other, so all of them are filled up to the same length.
    blank = Line2D([], [], linestyle="none", label="")
    entries = [entry for c in columns for entry in [*(handles[i] for i in c), *[blank] * (rows - len(c))]]
    legend = figure.legend(
        entries,
        [str(entry.get_label()) for entry in entries],
        loc="outside lower center",
        ncols=len(columns),
        frameon=False,
        title=_band_note(drawn),
        title_fontproperties={"size": 9.5, "style": "italic"},
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _band_note(drawn: Sequence[Series]) -> str | None:
    """What line and band show; nothing to say where each line is one run."""
    seeds = {len(series.seeds) for series in drawn}
    if seeds == {1}:
        return None
    over = f"{max(seeds)} seeds" if len(seeds) == 1 else "the seeds"
    return f"line: median over {over}, band: smallest to largest"
