"""The rates of the first-order methods: short runs first, then the best of them over the whole length."""

import math

import pytest

from replica_newton.reproduction.design import Extent, SetUp
from replica_newton.reproduction.experiment import Record
from replica_newton.reproduction.peers import PeerTuning
from replica_newton.reproduction.results import Request, Results

EXTENT = Extent(epochs=4, tuning_epochs=2)
TUNING = PeerTuning("mnist", SetUp("relu", 0.01, "unit"), "sgd", EXTENT)  # a grid from 0.03 to 1


def run(curves: dict[float, tuple[float, ...]]) -> tuple[Results, list[Request]]:
    """All that is asked for, in order, from made-up curves of four epochs; all other rates diverge at once."""
    results, order = Results(), []
    while True:
        requests = [*TUNING.short_requests(results), *TUNING.whole_requests(results)]
        missing = [one for one in requests if not one.tentative and results.get(one.experiment, one.epochs) is None]
        if not missing:
            return results, order
        order.append(missing[0])
        nll = curves.get(missing[0].experiment.rate, (math.nan,))[: missing[0].epochs]
        results.records[missing[0].experiment] = Record(missing[0].experiment, nll, tuple(range(len(nll))))


def tried(order: list[Request], epochs: int) -> list[float]:
    return [one.experiment.rate for one in order if one.epochs == epochs]


CURVES = {
    0.03: (2.0, 1.9, 1.8, 1.7),
    0.1: (2.0, 1.5, 1.2, 1.0),
    0.3: (1.5, 1.2, 1.1, 1.05),
    1.0: (1.0, 0.9, math.nan),
}


def test_the_best_of_the_short_runs_is_run_for_the_whole_length_and_what_diverges_is_replaced() -> None:
    results, order = run(CURVES)
    assert tried(order, 2) == [0.03, 0.1, 0.3, 1.0, 3.0]
    assert tried(order, 4) == [1.0, 0.3], "1 diverges in its third epoch"
    assert [one.experiment.rate for one in TUNING.whole_requests(results)] == [1.0, 0.3]
    best = TUNING.best(results)
    assert (best.experiment.rate, best.epochs, best.tentative) == (0.3, 4, False)


def test_nothing_is_settled_before_the_short_runs() -> None:
    assert [one.tentative for one in TUNING.whole_requests(Results())] == [True]
    results, _ = run(CURVES)
    del results.records[TUNING.short_requests(results)[0].experiment]
    assert TUNING.best(results).tentative


def test_a_method_that_always_diverges_is_run_and_shown_as_such() -> None:
    results, order = run({})
    assert len(tried(order, 2)) == 4 + 4, "smaller rates are tried, but not for ever"
    assert not TUNING.best(results).tentative
    record = results.get(TUNING.best(results).experiment, 4)
    assert record is not None
    assert record.diverged


@pytest.mark.parametrize("method", ["sgd", "momentum", "adam"])
def test_a_method_has_runs_of_its_own(method: str) -> None:
    requests = PeerTuning("mnist", TUNING.set_up, method, EXTENT).short_requests(Results())
    assert {one.experiment.method for one in requests} == {method}
    assert {(one.experiment.activation, one.experiment.scaling) for one in requests} == {("relu", "unit")}
