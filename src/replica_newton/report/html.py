"""Reports as one HTML file each that needs nothing else: no network, no script, no other file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from replica_newton.files import replace_file
from replica_newton.report import formats
from replica_newton.report.colours import line_colours
from replica_newton.report.curvature import curvature_figure
from replica_newton.report.figures import convergence_figure
from replica_newton.report.style import figure_svg, save_figure
from replica_newton.report.summary import Summary, compare, dataset_name, group_runs, headline, method_name


def write_report(summary: Summary, folder: Path, environment: Mapping[str, str]) -> Path:
    """Report as `report.html`: headline, figure, results, settings, environment and how to read them.

    Args:
        summary: Content of `summary.json`; incomplete runs are shown as far as they got.
        folder: Folder of the report; it is created when it is missing.
        environment: What the numbers were computed with, for example the versions of Python and torch, the platform,
            the number of threads and the command line.

    Returns:
        Path of the report.
    """
    series = group_runs(summary)
    standing = compare(series)
    page = _render(
        "report.html.j2",
        task=summary["task"],
        headline=headline(summary),
        runs=len(summary["runs"]),
        series=series,
        lowest=standing.lowest if standing else (),
        colours=line_colours((one.method, one.replicas) for one in series if one.best),
        nll_range=formats.format_nll_range,
        missing=formats.MISSING,
        epochs=range(1, max((len(one.nll) for one in series), default=0) + 1),
        figure=_inline_svg(convergence_figure(summary)),
        environment=environment,
    )
    path = folder / "report.html"
    replace_file(path, page.encode())
    return path


def write_curvature_report(
    seen: Sequence[Mapping[str, float]], settings: Mapping[str, object], folder: Path, environment: Mapping[str, str]
) -> Path:
    """The curvature of a run as `curvature.html`, and its figure alone as `.png` and `.svg`.

    Args:
        seen: lines of `curvature.jsonl`, at least one.
        settings: of the run.
        folder: of the run.
        environment: what the numbers were computed with.

    Returns:
        Path of the report.
    """
    figure = curvature_figure(seen)
    save_figure(figure, folder, "curvature")
    newest = {name.removeprefix("curvature/"): value for name, value in seen[-1].items()}
    page = _render(
        "curvature.html.j2",
        settings=settings,
        observations=len(seen),
        newest=newest,
        figure=_inline_svg(figure),
        environment=environment,
    )
    path = folder / "curvature.html"
    replace_file(path, page.encode())
    return path


def _render(template: str, **content: Any) -> str:
    templates = Environment(
        loader=PackageLoader("replica_newton.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        nll=formats.format_nll,
        count=formats.format_count,
        percent=formats.format_percent,
        seconds=formats.format_seconds,
        rate=formats.format_rate,
        setting=_setting,
        method_name=method_name,
        dataset_name=dataset_name,
    )
    return templates.get_template(template).render(**content)


def _inline_svg(figure: Figure) -> Markup:
    """The SVG element alone, without the XML header and the document type that HTML does not allow."""
    svg = figure_svg(figure)
    # Safe to mark: matplotlib escapes the texts that it writes.
    return Markup(svg[svg.index("<svg") :])  # noqa: S704


def _setting(value: object) -> str:
    """Value of a setting, with thousands separated and numbers without needless digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: formats.MISSING}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
