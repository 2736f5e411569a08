"""Where the replicas stand: what holds for every spread, and the formula of each."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from reference import normal
from torch import Tensor

from replica_newton import LocalStep, RandomDirections
from replica_newton.spread import Spread, regrouped

SPREADS = pytest.mark.parametrize(
    "build",
    [LocalStep, RandomDirections, lambda: RandomDirections(3, radius=0.2)],
    ids=["local-step", "random", "random-radius"],
)
RATES = pytest.mark.parametrize("rates", [0.05, torch.linspace(0.0, 0.3, 40)], ids=["one-rate", "rates"])
Build = Callable[[], Spread]


def gradients(M: int = 4, N: int = 40, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return (normal(M, N, seed=1) + 2.0).to(dtype)


@RATES
@pytest.mark.parametrize("M", [2, 3, 8])
@SPREADS
def test_rows_sum_to_zero_and_differ(build: Build, M: int, rates: Tensor | float):
    rows = build().displacements(gradients(M), rates, 0)
    assert rows.shape == (M, 40)
    torch.testing.assert_close(rows.sum(dim=0), torch.zeros(40, dtype=torch.float64), rtol=0.0, atol=1e-14)
    assert (rows.norm(dim=1) > 1e-3).all()


@RATES
@SPREADS
def test_the_same_arguments_give_the_same_displacements(build: Build, rates: Tensor | float):
    spread = build()
    first = spread.displacements(gradients(), rates, 5)
    spread.displacements(gradients(), rates, 6)
    torch.manual_seed(0)
    assert torch.equal(spread.displacements(gradients(), rates, 5), first)
    assert torch.equal(build().displacements(gradients(), rates, 5), first)


@SPREADS
def test_the_state_of_the_global_generator_is_left_alone(build: Build):
    before = torch.get_rng_state()
    build().displacements(gradients(), 0.1, 0)
    assert torch.equal(torch.get_rng_state(), before)


@RATES
@SPREADS
def test_the_gradients_are_left_alone(build: Build, rates: Tensor | float):
    given = gradients()
    build().displacements(given, rates, 0)
    assert torch.equal(given, gradients())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@SPREADS
def test_the_dtype_is_that_of_the_gradients(build: Build, dtype: torch.dtype):
    rows = build().displacements(gradients(dtype=dtype), 0.1, 0)
    assert rows.dtype == dtype
    assert rows.isfinite().all()


@SPREADS
def test_the_device_is_that_of_the_gradients(build: Build):
    rows = build().displacements(gradients().to("meta"), torch.ones(40, device="meta"), 0)
    assert rows.device.type == "meta"
    assert rows.shape == (4, 40)


@pytest.mark.parametrize("radius", [None, 1e-3, 1e3])
def test_one_replica_stands_at_the_shared_parameters(radius: float | None):
    for spread in (LocalStep(), RandomDirections(radius=radius)):
        assert torch.equal(spread.displacements(gradients(1), 0.1, 0), torch.zeros(1, 40, dtype=torch.float64))


@pytest.mark.parametrize("build", [LocalStep, RandomDirections], ids=["local-step", "random"])
def test_without_gradient_or_rate_the_replicas_do_not_part(build: Build):
    equal = gradients()[:1].expand(4, -1)
    assert torch.equal(build().displacements(gradients(), 0.0, 0), torch.zeros(4, 40, dtype=torch.float64))
    assert float(build().displacements(equal, 0.1, 0).abs().max()) < 1e-15


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda spread: pickle.loads(pickle.dumps(spread))])  # noqa: S301
@SPREADS
def test_a_copy_places_the_replicas_alike(build: Build, clone: Callable[[Spread], Spread]):
    spread = build()
    expected = spread.displacements(gradients(), 0.1, 2)
    assert torch.equal(clone(spread).displacements(gradients(), 0.1, 2), expected)


@pytest.mark.parametrize("spread", [LocalStep(), RandomDirections(3, radius=0.2), RandomDirections(4)], ids=repr)
def test_the_representation_rebuilds_the_spread(spread: Spread):
    names = {"LocalStep": LocalStep, "RandomDirections": RandomDirections}
    assert vars(eval(repr(spread), names)) == vars(spread)  # noqa: S307


@pytest.mark.parametrize("step", [0, 7])
@RATES
def test_a_local_step_goes_from_the_mean_along_the_own_gradient(rates: Tensor | float, step: int):
    g = gradients()
    expected = torch.stack([-rates * (row - sum(g) / 4) for row in g])
    torch.testing.assert_close(LocalStep().displacements(g, rates, step), expected, rtol=0.0, atol=1e-15)


@RATES
def test_random_displacements_are_as_long_as_local_steps(rates: Tensor | float):
    length = RandomDirections().displacements(gradients(), rates, 0).norm()
    torch.testing.assert_close(length, LocalStep().displacements(gradients(), rates, 0).norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("radius", [1e-3, 0.1, 20.0])
def test_the_radius_is_the_root_mean_square_length_whatever_the_gradients(radius: float, dtype: torch.dtype):
    for g in (gradients(dtype=dtype), 1e3 * gradients(dtype=dtype), 0.0 * gradients(dtype=dtype)):
        rows = RandomDirections(radius=radius).displacements(g, 0.1, 0).double()
        lengths = rows.square().sum(dim=1)
        assert float(lengths.mean().sqrt()) == pytest.approx(radius, rel=1e-14 if dtype == torch.float64 else 1e-6)


def cosine(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum() / (left.norm() * right.norm()))


def test_random_directions_differ_between_seeds_and_between_steps():
    g = gradients(N=1000)
    rows = {
        (seed, step): RandomDirections(seed).displacements(g, 0.1, step)
        for seed in (-1, 0, 1, 2, 2**32, 2**40 + 1)
        for step in (0, 1, 2, 1000)
        if (seed, step) != (2**32, 0)
    }
    keys = list(rows)
    for i, left in enumerate(keys):
        for right in keys[:i]:
            # Seeds that agree in 32 bits share their directions.
            if (left[0] - right[0]) % 2**32 or left[1] != right[1]:
                assert abs(cosine(rows[left], rows[right])) < 0.1, (left, right)


def test_random_directions_do_not_know_the_gradients():
    g = gradients(N=1000)
    random = RandomDirections().displacements(g, 0.1, 0)
    assert abs(cosine(random, LocalStep().displacements(g, 0.1, 0))) < 0.1


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_the_radius_must_be_positive_and_finite(radius: float):
    with pytest.raises(ValueError, match=rf"radius={radius} must be positive and finite"):
        RandomDirections(radius=radius)


def test_displacements_follow_the_replicas_that_go_and_come():
    rows = torch.tensor([[3.0, 0.0], [0.0, 6.0], [-3.0, -6.0]])
    assert regrouped(rows, [2, 3, 4], [2, 3, 4]) is rows
    # Row 3 goes: the mean of the others is (0, -3). Row 5 comes and starts at the shared parameters.
    expected = torch.tensor([[3.0, 3.0], [-3.0, -3.0], [0.0, 0.0]])
    assert torch.equal(regrouped(rows, [2, 3, 4], [2, 4, 5]), expected)
    assert torch.equal(regrouped(rows, [2, 3, 4], [4]), torch.zeros(1, 2))
    assert torch.equal(regrouped(rows, [2, 3, 4], [7, 8]), torch.zeros(2, 2))
