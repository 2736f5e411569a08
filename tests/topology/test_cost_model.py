import math

import pytest

from replica_newton.topology.cost_model import CostModel, Measurement, Setting, fit, work
from replica_newton.topology.estimate import estimate

TRUE = CostModel(latency=2e-5, byte=4e-10, element=3e-9, product=2e-10, call=1e-3)


@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_it_counts_the_bytes_that_the_estimate_does(replicas: int) -> None:
    parameters = 840_000  # divisible: nothing is filled up
    (load,) = estimate("tree", parameters, replicas)
    assert work(Setting(parameters, replicas)).sent == pytest.approx(load.sent + load.sums_sent, abs=8)


def test_one_replica_sends_nothing() -> None:
    assert (work(Setting(100, 1)).messages, work(Setting(100, 1)).sent) == (0.0, 0.0)


def test_a_step_by_hand() -> None:
    step = TRUE.step(Setting(1000, 2, every=4, crowding=1.5), gradient=0.1)
    assert step.gradient == pytest.approx(0.125)
    # Two and a quarter exchanges of rows and one and a quarter of sums, of one message each; sums of two losses, two
    # numbers about the mean gradient, six inner products of three rows and a flag.
    assert step.latency == pytest.approx(1.5 * (2.25 + 1.25) * 2e-5)
    assert step.bandwidth == pytest.approx(1.5 * (2.25 * 500 * 4 + 1.25 * 11 * 8) * 4e-10)
    assert step.vectors == pytest.approx(1.5 * 1000 * 3e-9)
    assert step.algebra == pytest.approx(1.5 * (9 * 500 + 8) * 2e-10)
    assert step.overhead == pytest.approx(1.5 * 1.25 * 1e-3)
    parts = step.gradient, step.latency, step.bandwidth, step.vectors, step.algebra, step.overhead
    assert step.total == pytest.approx(sum(parts))


def test_a_fit_finds_the_costs_that_made_the_times() -> None:
    measurements = []
    for parameters in (16_358, 1_000_000, 25_000_000):
        for replicas in (1, 2, 4, 8):
            setting = Setting(parameters, replicas, crowding=max(1.0, replicas / 2))
            gradient = 1e-8 * parameters
            measurements.append(Measurement(setting, gradient, TRUE.step(setting, gradient).total))
    found = fit(measurements)
    for name in ("latency", "byte", "element", "product", "call"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name


def test_costs_are_not_negative_even_where_noise_would_make_them_so() -> None:
    measurements = [Measurement(Setting(10**size, 2**size), 1.0, 1.0 + (-0.01) ** size) for size in range(1, 6)]
    model = fit(measurements)
    assert min(model.latency, model.byte, model.element, model.product, model.call) >= 0.0
    assert math.isfinite(model.step(Setting(10**6, 1024), 1.0).total)


def test_five_costs_need_five_measurements() -> None:
    with pytest.raises(ValueError, match="at least five measurements, got 1"):
        fit([Measurement(Setting(10, 2), 1.0, 2.0)])
