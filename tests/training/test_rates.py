import math

import pytest

from replica_newton.training.rates import neighbour, tune

GRID = (0.01, 0.03, 0.1)


@pytest.mark.parametrize(("rate", "above"), [(0.001, 0.003), (0.003, 0.01), (0.3, 1.0), (1.0, 3.0), (3.0, 10.0)])
def test_the_ladder(rate: float, above: float) -> None:
    assert neighbour(rate, up=True) == above
    assert neighbour(above, up=False) == rate


def loss(optimum: float, rate: float) -> float:
    """A bowl over the logarithm of the rate."""
    return abs(math.log(rate / optimum))


@pytest.mark.parametrize(
    ("optimum", "tried"),
    [
        (0.03, [0.01, 0.03, 0.1]),
        (0.003, [0.001, 0.003, 0.01, 0.03, 0.1]),
        (1.0, [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]),
    ],
)
def test_a_grid_reaches_past_the_best_on_both_sides(optimum: float, tried: list[float]) -> None:
    rates, losses = tune(GRID, lambda rate: loss(optimum, rate), 4)
    assert rates == tried
    assert losses == [loss(optimum, rate) for rate in tried]


def test_a_grid_does_not_grow_for_ever() -> None:
    assert tune(GRID, lambda rate: -rate, 2)[0] == [0.01, 0.03, 0.1, 0.3, 1.0]
    assert tune(GRID, lambda rate: rate, 1)[0] == [0.003, 0.01, 0.03, 0.1]
    assert tune(GRID, lambda _: math.inf, 1)[0][0] == 0.003, "where all diverge, smaller rates come next"


def test_there_are_no_losses_as_long_as_one_is_missing() -> None:
    known = {0.01: 3.0, 0.03: 2.0, 0.1: 1.0}
    assert tune(GRID, known.get, 1) == ([0.01, 0.03, 0.1, 0.3], None)
    assert tune(GRID, {}.get, 1) == (list(GRID), None)
