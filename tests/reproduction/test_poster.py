import math

import pytest

from replica_newton.reproduction.poster import REPLICAS, WORST_NLL, distance, orderings, poster_curves


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_the_poster_has_fifty_epochs_of_five_curves(dataset: str) -> None:
    curves = poster_curves(dataset)
    assert tuple(curves) == (1, *REPLICAS)
    assert all(len(values) == 50 for values in curves.values())
    assert all(0.3 < value < 2.4 for values in curves.values() for value in values)


def test_points_are_those_of_the_figure() -> None:
    assert poster_curves("mnist")[1][10] == pytest.approx(1.599, abs=1e-3)
    assert poster_curves("mnist")[8][49] == pytest.approx(0.321, abs=1e-3)
    assert poster_curves("cifar10")[2][49] == pytest.approx(2.048, abs=1e-3)


def test_the_poster_is_at_distance_zero_of_itself() -> None:
    assert distance("mnist", poster_curves("mnist")) == 0.0


def test_a_constant_factor_is_its_logarithm_away() -> None:
    scaled = {M: [1.1 * value for value in values] for M, values in poster_curves("mnist").items()}
    assert distance("mnist", scaled) == pytest.approx(math.log(1.1))
    assert distance("mnist", {8: scaled[8][:3]}) == pytest.approx(math.log(1.1))


def test_divergence_counts_as_the_worst_for_all_epochs_that_the_others_have() -> None:
    poster = poster_curves("mnist")
    both = {2: poster[2][:4], 8: (poster[8][0], math.nan)}
    lost = [math.log(WORST_NLL / poster[8][epoch]) ** 2 for epoch in (1, 2, 3)]
    assert distance("mnist", both) == pytest.approx(math.sqrt(sum(lost) / 8))
    assert distance("mnist", {8: (1e6,)}) == pytest.approx(math.log(WORST_NLL / poster[8][0]))


def test_nothing_has_no_distance() -> None:
    assert math.isnan(distance("mnist", {}))


def test_orderings_of_the_poster_itself() -> None:
    assert all(orderings(poster_curves("mnist")).values())
    # On CIFAR-10 M = 8 ends 0.1 % above M = 6.
    assert [name for name, holds in orderings(poster_curves("cifar10")).items() if not holds] == [
        "More replicas end lower"
    ]


def test_orderings_see_what_differs() -> None:
    flat = dict.fromkeys((1, *REPLICAS), (2.3, 1.0))
    met = orderings(flat)
    assert not met["SGD ends between M = 2 and M = 8"]
    assert not met["More replicas end lower"]
    assert met["M = 4 ends within 10 % of SGD"]
    diverged = flat | {8: (2.3, math.nan), 2: (2.3, 1.5)}
    assert not orderings(diverged)["M = 2 ends highest"]
    assert not orderings(diverged)["M = 8 reaches SGD's last NLL in half its epochs or fewer"]
