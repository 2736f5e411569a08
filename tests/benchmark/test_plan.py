import math
from collections.abc import Callable

import pytest

from replica_newton.benchmark.optimizers import METHODS
from replica_newton.benchmark.plan import QUICK, Extent, Plan
from replica_newton.benchmark.results import Records
from replica_newton.benchmark.run import Run
from replica_newton.benchmark.tasks import TASKS
from replica_newton.training.rates import neighbour

Completed = Callable[[Plan, Callable[[Run], float]], tuple[Records, list[Run]]]


def valley(best: float) -> Callable[[Run], float]:
    """A final NLL that is lowest at a rate; every seed is a little higher than the one before."""
    return lambda run: 1.0 + 0.3 * math.log10(run.rate / best) ** 2 + 0.01 * run.seed


def plan(method: str = "sgd", **extent: int) -> Plan:
    return Plan(("digits-mlp",), (method,), Extent(**extent))


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (0.3, (0.03, 0.1, 0.3, 1.0, 3.0)),
        (0.03, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
        (0.003, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
        (10.0, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
    ],
)
def test_a_grid_grows_until_it_holds_its_optimum(completed: Completed, best: float, rates: tuple[float, ...]) -> None:
    one = plan()
    records, order = completed(one, valley(best))
    entry = one.entry(records, "digits-mlp", "sgd")
    assert entry is not None
    assert entry.rates == rates
    assert entry.rate == best
    assert not entry.at_the_edge
    at = rates.index(best)
    compared = rates[at - 1 : at + 2]
    assert {(run.rate, run.seed) for run in order if run.seed} == {(rate, s) for rate in compared for s in (1, 2)}
    assert len(order) == len(rates) + 6
    assert {rate: len(values) for rate, values in entry.finals.items()} == {
        rate: 3 if rate in compared else 1 for rate in rates
    }


def test_a_grid_does_not_grow_for_ever(completed: Completed) -> None:
    one = plan()
    records, _ = completed(one, valley(1e9))
    entry = one.entry(records, "digits-mlp", "sgd")
    assert entry is not None
    assert entry.rates[-3:] == (10.0, 30.0, 100.0)
    assert entry.rate == 100.0
    assert entry.at_the_edge


def test_a_method_that_always_diverges_is_looked_for_below(completed: Completed) -> None:
    one = plan()
    records, _ = completed(one, lambda _: math.inf)
    entry = one.entry(records, "digits-mlp", "sgd")
    assert entry is not None
    assert entry.rates[0] == 0.001
    assert entry.finals[entry.rate] == [math.inf] * 3


def test_the_seeds_decide_between_the_rates_and_not_the_first_alone(completed: Completed) -> None:
    def lucky(run: Run) -> float:
        return 0.95 if run.seed == 0 and run.rate == 0.3 else valley(1.0)(run)

    one = plan()
    entry = one.entry(completed(one, lucky)[0], "digits-mlp", "sgd")
    assert entry is not None
    assert entry.rate == 1.0


def test_what_comes_close_is_compared_and_not_what_stands_beside(completed: Completed) -> None:
    finals = {0.03: 1.05, 0.1: 2.0, 0.3: 1.0, 1.0: 1.2, 3.0: 3.0}
    _, order = completed(plan(), lambda run: finals.get(run.rate, 9.0) + 0.01 * run.seed)
    assert {run.rate for run in order if run.seed} == {0.03, 0.3}


def test_a_single_rate_is_not_tuned(completed: Completed) -> None:
    one = plan("replica-newton")
    records, order = completed(one, valley(100.0))
    assert [(run.rate, run.seed) for run in order] == [(1.0, seed) for seed in range(10)]
    entry = one.entry(records, "digits-mlp", "replica-newton")
    assert entry is not None
    assert len(entry.finals[1.0]) == 3
    assert not entry.at_the_edge


def test_choices_to_be_made_are_tentative_and_counted() -> None:
    runs = list(plan().runs({}))
    assert [run.seed for run in runs if not run.tentative] == [0] * 5
    assert [run.seed for run in runs if run.tentative] == [1, 2]
    assert plan().entry({}, "digits-mlp", "sgd") is None


def test_the_quick_version_is_small(completed: Completed) -> None:
    whole = Plan(extent=QUICK)
    _, order = completed(whole, valley(1e9))
    assert all(run.seed == 0 for run in order)
    assert {run.train_limit for run in order if run.task == "mnist-relu"} == {2048}
    peers = [name for name, method in METHODS.items() if method.tuned]
    assert {len({run.rate for run in order if run.method == name}) for name in peers} == {3}


def test_lbfgs_is_for_large_batches() -> None:
    applied = {task for task, method in Plan().pairs() if method == "lbfgs"}
    assert applied == {name for name, task in TASKS.items() if task.batch_size > 1000}
    assert {task for task, method in Plan().pairs() if method == "sgd"} == set(TASKS)


def test_every_peer_has_five_rates_of_the_ladder() -> None:
    for name, method in METHODS.items():
        if method.is_peer:
            assert len(method.rates) >= 5, name
            assert [neighbour(rate, up=True) for rate in method.rates[:-1]] == list(method.rates[1:])
