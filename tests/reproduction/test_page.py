"""The published page and its raw results: the one follows from the other, and from a part of it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replica_newton.report.style import figure_svg, save_figure
from replica_newton.reproduction.curve_figures import panels_figure, search_figure
from replica_newton.reproduction.findings import findings, panel_curves
from replica_newton.reproduction.page import page_text
from replica_newton.reproduction.plan import Plan
from replica_newton.reproduction.results import Results, load_results
from replica_newton.reproduction.study import Study

DOCS = Path(__file__).parents[2] / "docs"
SUMMARY = DOCS / "reproduction" / "summary.json"
COMMAND = "replica-newton reproduce"
PLAN = Plan()


@pytest.fixture(scope="module")
def results() -> Results:
    return load_results(SUMMARY)


@pytest.fixture(scope="module")
def found(results: Results) -> dict[str, Any]:
    return findings(PLAN, results)


def test_the_page_follows_from_its_raw_results(results: Results, found: dict[str, Any]) -> None:
    page = (DOCS / "reproduction.md").read_text(encoding="utf-8")
    assert page_text(PLAN, results, found, COMMAND) == page
    assert "not run" not in page
    assert not re.search(r"[ \t]$|\bnan\b|None|Undefined", page, flags=re.MULTILINE)


def test_the_findings_beside_the_runs_are_those_of_the_runs(found: dict[str, Any]) -> None:
    written = json.loads(SUMMARY.read_text(encoding="utf-8"))["findings"]
    assert written["figure2"]["mnist"]["closest"]["last"]["8"] == pytest.approx(
        found["figure2"]["mnist"]["closest"]["last"]["8"], rel=1e-5
    )
    assert written["search"]["best"] == found["search"]["best"]
    assert written["orderings"] == found["orderings"]


def test_every_figure_of_the_page_is_there() -> None:
    page = (DOCS / "reproduction.md").read_text(encoding="utf-8")
    named = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert len(named) == 9
    assert all((DOCS / name).stat().st_size > 10_000 for name in named)


def test_tables_have_as_many_cells_in_every_row() -> None:
    page = (DOCS / "reproduction.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^ *\|.*\n)+", page, flags=re.MULTILINE)
    assert len(tables) > 10
    for table in tables:
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(cells)) == 1, table


def test_peers_are_at_the_best_of_rates_that_reach_past_it(found: dict[str, Any]) -> None:
    for dataset in PLAN.datasets:
        tunings = [one for one in found["peers"][dataset] if one["tuning"]]
        assert {one["role"] for one in tunings} == {"sgd", "momentum", "adam"}
        for one in tunings:
            assert not one["tuning"]["at_end_of_grid"]
            assert one["last"] is not None
            ranked = sorted(
                (run for run in one["tuning"]["short"] if run["last"] is not None), key=lambda run: run["last"]
            )
            whole = one["tuning"]["whole"]
            assert [run["rate"] for run in whole] == [run["rate"] for run in ranked[: len(whole)]]
            assert [run["last"] is None for run in whole] == [True] * (len(whole) - 1) + [False]
            assert one["rate"] == whole[-1]["rate"]


def test_a_page_without_some_panels_says_so(results: Results, found: dict[str, Any], tmp_path: Path) -> None:
    dropped = [
        request.experiment
        for dataset in PLAN.datasets
        for request in PLAN.panel_requests(results, dataset, PLAN.set_up(results, dataset))
        if request.experiment.replicas in {4, 6} and request.experiment.rate == 0.0003
    ]
    part = replace(results, records={key: one for key, one in results.records.items() if key not in dropped})
    study = Study(PLAN, {}, tmp_path / "summary.json", tmp_path, 1)
    assert len(study.missing(part)) == len(dropped) == 8
    assert study.presentable(part)
    changed = findings(PLAN, part)
    page = page_text(PLAN, part, changed, COMMAND)
    assert page.count("not run") == 8
    assert changed["figure2"] == found["figure2"]
    panels = {key: one for dataset in PLAN.datasets for key, one in panel_curves(PLAN, part, dataset).items()}
    save_figure(panels_figure(panels), tmp_path, "panels")
    assert (tmp_path / "panels.png").exists()


def test_a_study_without_its_figure_is_not_presentable(results: Results, tmp_path: Path) -> None:
    best = PLAN.best(results)
    assert best is not None
    dropped = PLAN.figure_requests(results, "mnist", best)[2].experiment
    part = replace(results, records={key: one for key, one in results.records.items() if key != dropped})
    assert not Study(PLAN, {}, tmp_path / "summary.json", tmp_path, 1).presentable(part)


def test_figures_are_the_same_whenever_they_are_drawn(results: Results, tmp_path: Path) -> None:
    distances = PLAN.search_distances(results, 0)
    assert distances is not None
    figures = [search_figure(distances, 0.1) for _ in range(2)]
    for folder, figure in zip("ab", figures, strict=True):
        save_figure(figure, tmp_path / folder, "readings")
    for ending in ("png", "svg"):
        assert (tmp_path / f"a/readings.{ending}").read_bytes() == (tmp_path / f"b/readings.{ending}").read_bytes()
    # A constrained layout would have moved on.
    assert figure_svg(figures[0]) == (tmp_path / "a/readings.svg").read_text(encoding="utf-8")
