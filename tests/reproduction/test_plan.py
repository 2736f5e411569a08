import math
from collections.abc import Callable

import pytest

from replica_newton.reproduction.design import FULL, QUICK, RATES, Candidate, Extent, SetUp
from replica_newton.reproduction.experiment import Experiment, Record
from replica_newton.reproduction.plan import Plan
from replica_newton.reproduction.poster import REPLICAS, poster_curves
from replica_newton.reproduction.readings import LITERAL, READINGS
from replica_newton.reproduction.results import Request, Results

PLANTED = Candidate("different-own-common-dropped-eigenvalue-orthogonal", 0.0003)
SET_UPS = {"mnist": SetUp("relu", 0.01, "unit"), "cifar10": SetUp("tanh", 0.0003, "symmetric")}


NUMBERS = {reading.name: number for number, reading in enumerate(READINGS)}


def outcome(request: Request) -> tuple[float, ...]:
    """A world in which the planted reading is what the poster shows, all others differ, and 0.01 is everyone's rate."""
    one = request.experiment
    poster = poster_curves(one.dataset)[one.replicas]
    factor = 1.5 + 0.002 * NUMBERS.get(one.method, 0)
    if one.method == "sgd" and (one.activation, one.rate, one.scaling) == SET_UPS[one.dataset]:
        factor = 1.0
    elif (one.method, one.rate) == PLANTED:
        factor = 1.01
    elif one.rate >= 0.1:
        return (2.3, math.nan)
    elif one.method not in NUMBERS:
        factor += abs(math.log10(one.rate) + 2.0)
    return tuple(factor * value for value in poster[: request.epochs])


def run(plan: Plan, outcome: Callable[[Request], tuple[float, ...]]) -> tuple[Results, list[Request]]:
    """The study with made-up outcomes: always the first request that can be met."""
    results, order = Results(), []
    while True:
        ready = (
            one
            for one in plan.requests(results)
            if not one.tentative and results.get(one.experiment, one.epochs) is None
        )
        request = next(ready, None)
        if request is None:
            return results, order
        order.append(request)
        nll = outcome(request)
        results.records[request.experiment] = Record(
            request.experiment, nll, tuple(range(256, 256 * len(nll) + 1, 256)), 100, nll[-1], 0.9, 1.0
        )


@pytest.fixture(scope="module")
def study() -> tuple[Plan, Results, list[Request]]:
    plan = Plan(extent=Extent(epochs=20))
    return plan, *run(plan, outcome)


def test_the_planted_reading_and_set_ups_are_found(study: tuple[Plan, Results, list[Request]]) -> None:
    plan, results, _ = study
    assert plan.best(results) == PLANTED
    assert plan.set_ups(results) == SET_UPS
    final = plan.search_distances(results, 2)
    assert final is not None
    assert final[PLANTED] == pytest.approx(math.log(1.01))


def test_nothing_is_tentative_in_the_end(study: tuple[Plan, Results, list[Request]]) -> None:
    plan, results, _ = study
    assert not any(request.tentative for request in plan.requests(results))


def test_at_first_only_the_calibration_is_settled() -> None:
    settled = [request for request in Plan().requests(Results()) if not request.tentative]
    assert {request.experiment.method for request in settled} <= {"sgd"}
    assert len(settled) == 24


def test_what_is_not_settled_is_counted_as_much_as_it_will_be(study: tuple[Plan, Results, list[Request]]) -> None:
    plan, results, _ = study
    before = list(plan.requests(Results()))
    after = list(plan.requests(results))
    # The rates that a grid turns out to need beyond its ends are few.
    assert len(before) == pytest.approx(len(after), rel=0.01)
    assert sum(one.epochs for one in before) == pytest.approx(sum(one.epochs for one in after), rel=0.05)


def test_rounds_keep_the_closest(study: tuple[Plan, Results, list[Request]]) -> None:
    plan, results, order = study
    for number, one in enumerate(plan.extent.rounds):
        candidates = plan.candidates(results, number)
        assert candidates is not None
        assert len(candidates) == (one.candidates or 2 * len(READINGS))
        assert PLANTED in candidates
        runs = {(request.experiment, request.epochs) for request in order}
        expected = len(candidates) * len(one.replicas) * len(plan.datasets)
        found = {
            request.experiment
            for request in plan.round_requests(results, number)
            if (request.experiment, request.epochs) in runs or results.get(request.experiment, request.epochs)
        }
        assert len(found) == expected


def test_the_figure_has_every_curve_at_its_full_length(study: tuple[Plan, Results, list[Request]]) -> None:
    plan, results, _ = study
    for dataset in plan.datasets:
        for candidate in (PLANTED, Candidate(LITERAL.name, SET_UPS[dataset].rate)):
            records = [results.get(one.experiment, 20) for one in plan.figure_requests(results, dataset, candidate)]
            assert [record.experiment.replicas for record in records if record] == [1, *REPLICAS]
        panels = list(plan.panel_requests(results, dataset, SET_UPS[dataset]))
        assert len(panels) == 4 * 5
        assert {(one.experiment.activation, one.experiment.rate) for one in panels} == {
            (activation, rate) for activation in ("relu", "tanh") for rate in RATES
        }


def test_peers_run_at_their_best_rate_even_beyond_their_grid(
    study: tuple[Plan, Results, list[Request]],
) -> None:
    plan, results, _ = study
    best = {one.experiment.method: one.experiment.rate for one in plan.best_peers(results, "mnist")}
    assert best == {"sgd": 0.01, "momentum": 0.01, "adam": 0.01, "sharpness-rate": 0.01, "replica-newton": 1.0}


def test_all_lengths_of_a_run_are_one_run() -> None:
    results = Results()
    experiment = Experiment("mnist", "sgd", 1, 0.01, "relu")
    results.records[experiment] = Record(experiment, (2.0, 1.0, 0.5), (256, 512, 768))
    shortened = results.get(experiment, 2)
    assert shortened is not None
    assert shortened.train_nll == (2.0, 1.0)
    assert shortened.gradient_evaluations == (256, 512)
    assert results.get(experiment, 4) is None
    results.records[experiment] = Record(experiment, (2.0, math.nan), (256, 300))
    assert results.get(experiment, 4) is not None


def test_one_data_set_alone_can_be_studied() -> None:
    plan = Plan(("cifar10",), QUICK)
    results, order = run(plan, outcome)
    assert {request.experiment.dataset for request in order} == {"cifar10"}
    assert plan.best(results) is not None
    assert all(request.experiment.train_limit == QUICK.train_limit for request in order)


def test_the_whole_study_is_the_papers() -> None:
    assert FULL.epochs == 50
    assert FULL.train_limit is None
