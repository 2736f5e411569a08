"""The page of the study: docs/reproduction.md with its figures, from the results alone."""

import math
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from replica_newton.files import replace_file
from replica_newton.report.formats import MISSING, format_nll, format_percent
from replica_newton.report.markdown import render_markdown
from replica_newton.report.style import save_figure
from replica_newton.reproduction.curve_figures import (
    ACTIVATION_NAMES,
    DATASET_NAMES,
    panels_figure,
    peers_figure,
    plateau_figure,
    poster_figure,
    search_figure,
)
from replica_newton.reproduction.design import Candidate
from replica_newton.reproduction.findings import (
    PEER_NAMES,
    UNTUNED_ROLES,
    figure2_curves,
    findings,
    panel_curves,
    peer_records,
    plateau_steps,
)
from replica_newton.reproduction.mechanism_figures import mechanism_figure
from replica_newton.reproduction.optimal_rate_figures import optimal_rate_figure
from replica_newton.reproduction.plan import Plan
from replica_newton.reproduction.readings import reading_named
from replica_newton.reproduction.results import Results, save_results
from replica_newton.reproduction.surface_figures import save_animation, surfaces_figure
from replica_newton.reproduction.surface_methods import METHODS

SUMMARY = "summary.json"
_SCALING_NAMES = {
    "standard": "images of mean 0 and deviation 1",
    "unit": "images in 0 … 1",
    "symmetric": "images in −1 … 1",
}


def write_page(plan: Plan, results: Results, folder: Path, command: str) -> Path:
    """Write `reproduction.md`, and `reproduction/` with the figures and all numbers.

    Args:
        plan: of the study.
        results: all of its runs and measurements.
        folder: where the page goes.
        command: that made it.

    Returns:
        Path of the page.

    Raises:
        ValueError: if the study is not finished.
    """
    found = findings(plan, results)
    best = Candidate(**found["search"]["best"])
    place = folder / "reproduction"
    save_results(place / SUMMARY, results, findings=found)
    curves = {
        "closest reading": {dataset: figure2_curves(plan, results, dataset, best) for dataset in plan.datasets},
        "literal reading": {dataset: figure2_curves(plan, results, dataset, None) for dataset in plan.datasets},
    }
    panels = {key: one for dataset in plan.datasets for key, one in panel_curves(plan, results, dataset).items()}
    save_figure(poster_figure(curves), place, "figure2")
    save_figure(panels_figure(panels), place, "panels")
    peers = {dataset: peer_records(plan, results, dataset, best) for dataset in plan.datasets}
    save_figure(peers_figure(peers), place, "peers")
    save_figure(
        search_figure(plan.search_distances(results, 0) or {}, found["search"]["rounds"][0]["no_effect"]),
        place,
        "readings",
    )
    save_figure(plateau_figure(plateau_steps(plan, results), found["plateau"]["limit"]), place, "plateau")
    mechanism = next(one for one in plan.measurements() if one.quantity == "mechanism")
    save_figure(mechanism_figure(results.measurements[mechanism.name]), place, "mechanism")
    save_figure(optimal_rate_figure(_optimal_rates(plan, results)), place, "optimal_rate")
    save_figure(surfaces_figure(), place, "figure1")
    save_animation(place / "figure1.gif")
    path = folder / "reproduction.md"
    replace_file(path, page_text(plan, results, found, command).encode())
    return path


def page_text(plan: Plan, results: Results, found: dict[str, Any], command: str) -> str:
    """The page without its figures.

    Args:
        plan: of the study.
        results: all of its runs and measurements; panels may be missing.
        found: what `findings` says of them.
        command: that made it.

    Returns:
        Markdown.
    """
    measured = {one.quantity: results.measurements[one.name] for one in plan.measurements()}
    return render_markdown(
        "replica_newton.reproduction",
        "reproduction.md.j2",
        _filters(),
        command=command,
        quick=plan.extent.train_limit is not None,
        tuning_epochs=plan.extent.tuning_epochs,
        peer_names=PEER_NAMES,
        untuned=UNTUNED_ROLES,
        reading=reading_named(found["search"]["best"]["reading"]),
        findings=found,
        surfaces=measured["surfaces"],
        mechanism=measured["mechanism"],
        rates=_optimal_rates(plan, results),
        surface_methods={name: method.label for name, method in METHODS.items()},
    )


def _optimal_rates(plan: Plan, results: Results) -> list[dict[str, Any]]:
    return [results.measurements[one.name] for one in plan.measurements() if one.quantity == "optimal_rate"]


def _filters() -> dict[str, Callable[..., Any]]:
    return {
        "distance": lambda value: MISSING if value is None else format_nll(value),
        "number": _number,
        "plain": lambda value: f"{value:g}",
        "percent": lambda value: MISSING if value is None else format_percent(value),
        "tick": lambda holds: "yes" if holds else "no",
        "dataset": DATASET_NAMES.__getitem__,
        "activation": ACTIVATION_NAMES.__getitem__,
        "cell": lambda text: text.replace("|", "\\|"),
        "set_up": _set_up,
        "steps": lambda value: "not left" if value is None else f"{value:,}",
        "arrival": lambda one: "never" if one["steps"] is None else str(one["steps"]),
        "best_multiples": _best_multiples,
        "median": median,
        "sharpness_error": _sharpness_error,
        "at": lambda values, places, place: values[places.index(place)],
        "replicas_only": lambda last: [value for M, value in last.items() if M != "1"],
        "group": lambda groups, data, rate: next(one for one in groups if (one["data"], one["rate"]) == (data, rate)),
        "overshoot": _overshoot,
        "ratios": _ratios,
        "cases": _cases,
    }


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or value == 0.0 else f"{value:.1e}"


def _set_up(one: dict[str, Any]) -> str:
    return f"{ACTIVATION_NAMES[one['activation']]}, {one['rate']:g}, {_SCALING_NAMES[one['scaling']]}"


def _overshoot(groups: list[dict[str, Any]]) -> list[tuple[int, float, str, dict[str, str]]]:
    """Rows of the overshoot: size, exponent and error, and the range over M for each kind of displacement."""

    def setting(one: dict[str, Any]) -> tuple[int, float, str]:
        return one["size"], one["exponent"], one["error"]

    rows = []
    for key, members in groupby(sorted(groups, key=setting), setting):
        ranges = {
            one["displacements"]: f"{_number(min(one['captured_length']['median']))} – "
            f"{_number(max(one['captured_length']['median']))}"
            for one in members
        }
        rows.append((*key, ranges))
    return rows


def _cases(figure2: dict[str, Any], *falling: str) -> str:
    """In how many of our cases the last NLL falls strictly along some numbers of replicas."""
    held = [
        all(low < high for high, low in pairwise(math.inf if last[M] is None else last[M] for M in falling))
        for panel in figure2.values()
        for last in (panel["literal"]["last"], panel["closest"]["last"])
    ]
    return f"{sum(held)} of {len(held)} cases"


def _ratios(group: dict[str, Any]) -> str:
    """Range of the inverse curvature taken over the true one."""
    found = [taken / true for taken, true in zip(group["claimed"], group["true"], strict=True) if taken and true]
    return f"{_number(min(found))} – {_number(max(found))}"


def _sharpness_error(rates: list[dict[str, Any]]) -> float:
    """Largest relative error of the replicas' λ_max."""
    pairs = [
        (run["sharpness"]["replicas"]["value"], run["sharpness"]["exact"]["value"])
        for one in rates
        for run in one["runs"]
    ]
    return max((abs(replicas / exact - 1.0) for replicas, exact in pairs), default=math.nan)


def _best_multiples(rates: list[dict[str, Any]]) -> str:
    """Range of the best multiples of 1/λ_max under full batch."""
    best = [multiple for one in rates for multiple in one["summary"]["full_batch"]["best"]]
    return f"{_number(min(best))} to {_number(max(best))}"
