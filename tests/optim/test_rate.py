"""The rate from the distance to go."""

import math

import pytest
import torch
from reference import generator

from replica_newton.optim.rate import DistanceRate


def grown(slopes: list[tuple[float, float]], *, relative: float = 1.0, ceiling: float = 100.0) -> float:
    """By which factor the distance has grown, after slopes from the end of the warm-up on."""
    rate = DistanceRate(warm_up=1)
    before = rate(0.7) / rate.share
    for pair in slopes:
        rate.observe(*pair, relative)
        rate(0.7 * ceiling)
    return float(rate.distance or math.nan) / before


def test_it_rises_to_the_share_of_the_weights_size_and_falls_like_the_root():
    rate = DistanceRate(share=0.2, warm_up=4)
    got = [rate(0.7) for _ in range(16)]
    assert got[:5] == pytest.approx([0.2 * 0.7 * part for part in (0.25, 0.5, 0.75, 1.0, 0.8**0.5)])
    assert got[15] == pytest.approx(0.2 * 0.7 * 0.5)


def test_it_scales_with_the_parameters():
    assert DistanceRate()(2e6) == pytest.approx(1e6 * DistanceRate()(2.0))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_it_grows_while_steps_take_away_less_than_a_fifth_of_the_slope(scale: float):
    assert grown([(scale, 0.85 * scale)] * 20) == pytest.approx(1.05**16)  # four are not yet significant
    # The slope before the first pair is not known, so what is after it counts as growth: once.
    assert grown([(scale, 0.75 * scale)] * 40) < 1.05**14
    assert grown([(scale, -scale)] * 40) == 1.0


def test_a_smaller_relative_rate_must_take_away_less():
    assert grown([(1.0, 0.85)] * 40, relative=0.5) < grown([(1.0, 0.95)] * 40, relative=0.5) == pytest.approx(1.05**36)


def test_it_does_not_grow_beyond_the_weights():
    assert grown([(1.0, 1.0)] * 60, ceiling=3.0) == pytest.approx(3.0)
    assert grown([(1.0, 1.0)] * 60, ceiling=0.5) == 1.0


def test_slopes_that_are_noise_leave_it_where_it_is():
    noise = torch.randn(400, 2, generator=generator(4), dtype=torch.float64)
    pairs = [(0.1 + float(a), 0.1 + float(b)) for a, b in noise]
    assert grown(pairs) < 1.5


def cut(losses: list[float]) -> float:
    """By which factor the rate is lower for losses, the first ten of which are those of the first steps."""
    rate, other = DistanceRate(), DistanceRate()
    ratio = 1.0
    for loss in losses:
        rate.observe_loss(loss)
        ratio = rate(0.7) / other(0.7)
    return ratio


@pytest.mark.parametrize(("first", "twice"), [(1.0, 2.0), (-3.0, 0.0), (1e-9, 2e-9)])
def test_a_loss_that_has_doubled_cuts_it_for_good(first: float, twice: float):
    steady, more = [first] * 30, twice + 0.5 * abs(first)
    assert cut(steady + [twice - 0.1 * abs(first)] * 100) == 1.0
    # An average over ten steps passes the mark after a dozen of them.
    risen = cut(steady + [more] * 30)
    assert 1.05**-30 < risen < 1.05**-10
    assert cut(steady + [more] * 1000) == pytest.approx(1 / 16)
    assert cut(steady + [more] * 30 + [-abs(first)] * 1000) < risen


def test_noise_in_the_loss_does_not_cut_it():
    losses = 1.0 + torch.randn(2000, generator=generator(7), dtype=torch.float64)
    assert cut(losses.tolist()) == 1.0


def test_it_goes_on_from_its_state():
    rate, resumed = DistanceRate(), DistanceRate()
    for _ in range(30):
        rate(0.7)
        rate.observe(1.0, 0.9)
        rate.observe_loss(1.0)
    resumed.load_state_dict(rate.state_dict())
    for one in (rate, resumed):
        one.observe(1.0, 0.95)
    assert [resumed(1.4) for _ in range(20)] == [rate(1.4) for _ in range(20)]


def test_parameters_that_are_all_zero_have_a_rate():
    assert DistanceRate()(0.0) > 0.0


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": float("inf")}, {"warm_up": 0}])
def test_options_out_of_range_are_refused(options: dict[str, float]):
    with pytest.raises(ValueError, match="must be"):
        DistanceRate(**options)
