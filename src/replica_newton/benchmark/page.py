"""The page of the benchmark: docs/benchmarks.md with its figures, from the results alone."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from replica_newton.benchmark.figures import convergence_figure, rates_figure, time_figure
from replica_newton.benchmark.findings import entries, findings, median_record
from replica_newton.benchmark.optimizers import METHODS, OURS
from replica_newton.benchmark.plan import Plan
from replica_newton.benchmark.results import Records, save_records
from replica_newton.benchmark.tasks import TASKS
from replica_newton.files import replace_file
from replica_newton.report.formats import MISSING, format_rate, format_seconds
from replica_newton.report.markdown import render_markdown
from replica_newton.report.style import save_figure

PAGE = "benchmarks.md"
PLACE = "benchmarks"
SUMMARY = "summary.json"
_FILTERS: dict[str, Callable[[Any], str]] = {
    "ratio": lambda value: "diverged" if value is None else f"{value:.3f}" if value < 100.0 else f"{value:,.0f}",
    "rate": format_rate,
    "seconds": lambda value: MISSING if value is None else format_seconds(value),
    "hours": lambda value: f"{value:.2g}",
}


def write_page(plan: Plan, records: Records, folder: Path, command: str) -> Path:
    """Write `benchmarks.md`, and `benchmarks/` with the figures and all numbers.

    Args:
        plan: of the benchmark.
        records: all of its runs.
        folder: where the page goes.
        command: that made it.

    Returns:
        Path of the page.

    Raises:
        ValueError: if the benchmark is not finished.
    """
    found = findings(plan, records)
    place = folder / PLACE
    save_records(place / SUMMARY, records, findings=found, environment=_environment())
    rows = {
        task: {name: entry for name, entry in one.items() if METHODS[name].family != "ablation"}
        for task, one in entries(plan, records).items()
    }
    curves = {
        task: {name: median_record(plan, records, entry) for name, entry in one.items()} for task, one in rows.items()
    }
    save_figure(convergence_figure(curves), place, "convergence")
    save_figure(time_figure(curves), place, "time")
    save_figure(rates_figure(rows), place, "rates")
    page = render_markdown(
        "replica_newton.benchmark",
        "benchmarks.md.j2",
        _FILTERS,
        findings=found,
        plan=plan,
        tasks=TASKS,
        methods=METHODS,
        ours=OURS,
        command=command,
        environment=_environment(),
    )
    replace_file(folder / PAGE, page.encode())
    return folder / PAGE


def _environment() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
    }
