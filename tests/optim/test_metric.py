"""Coordinates and units of a step."""

import pytest
import torch
from reference import generator
from torch import Tensor

from replica_newton.benchmark.optimizers import UnfittedMetric
from replica_newton.optim.metric import Metric, MetricName

METRICS = ("identity", "diagonal", "kronecker")


def gradients(*shape: int, steps: int = 12) -> list[Tensor]:
    return list(torch.randn(steps, *shape, generator=generator(3), dtype=torch.float64))


def steps_of(metric: Metric, given: list[Tensor]) -> list[Tensor]:
    state: dict[str, Tensor] = {}
    return [metric.unit_steps([state], [gradient])[0] for gradient in given]


def test_the_diagonal_metric_is_adam_from_the_second_gradient_on():
    given = gradients(3, 4)
    weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.95), eps=0.0)
    expected = []
    for gradient in given[1:]:
        before, weight.grad = weight.detach().clone(), gradient
        adam.step()
        expected.append(before - weight.detach())
    got = steps_of(Metric("diagonal", momentum=0.9, decay=0.95), given)[1:]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_the_first_step_is_the_gradient_at_unit_size(name: MetricName):
    given = gradients(3, 4)[0]
    torch.testing.assert_close(steps_of(Metric(name), [given])[0], given / given.square().mean().sqrt())


def test_the_identity_metric_keeps_the_direction_of_the_averaged_gradient():
    given = gradients(3, 4)
    average = torch.zeros(3, 4, dtype=torch.float64)
    for gradient in given[1:]:
        average = 0.9 * average + 0.1 * gradient
    got = steps_of(Metric("identity"), given)[-1]
    torch.testing.assert_close(got / got.norm(), average / average.norm())


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_the_scale_of_the_loss_does_not_matter(name: MetricName, scale: float):
    given = [gradient.float() for gradient in gradients(3, 4)]
    scaled = [gradient * scale for gradient in given]
    torch.testing.assert_close(steps_of(Metric(name), scaled), steps_of(Metric(name), given), rtol=0.0, atol=0.0)


def test_the_kronecker_metric_turns_with_its_coordinates():
    given = gradients(4, 3)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator(n), dtype=torch.float64)).Q for n in (4, 3))
    turned = steps_of(Metric("kronecker"), [left @ gradient @ right for gradient in given])
    expected = [left @ step @ right for step in steps_of(Metric("kronecker"), given)]
    torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-8)
    diagonal = steps_of(Metric("diagonal"), [left @ gradient @ right for gradient in given])
    assert not torch.allclose(
        diagonal[-1], left @ steps_of(Metric("diagonal"), given)[-1] @ right, rtol=1e-2, atol=1e-2
    )


def test_the_bases_become_the_eigenvectors_of_the_factors():
    metric, state = Metric("kronecker", refresh_every=1, decay=0.0), {}
    gradient = gradients(4, 3)[0]
    other = gradients(4, 3)[1]
    metric.unit_steps([state], [other])[0]
    for _ in range(400):
        metric.unit_steps([state], [gradient])[0]
    for side, matrix in (("left", gradient @ gradient.T), ("right", gradient.T @ gradient)):
        basis = state[f"{side}_basis"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64))
        turned = basis.T @ matrix @ basis
        torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("step", [5, 6, 15, 30])
def test_second_moments_have_the_sums_that_the_factors_have_in_bases_that_have_just_turned(step: int):
    metric, state = Metric("kronecker", refresh_every=1), {}
    for gradient in gradients(4, 3, steps=step):
        metric.unit_steps([state], [gradient])[0]
    V = state["second_moment"] / (1.0 - metric.decay ** (step - 1))
    for side, sums in (("left", V.sum(dim=1)), ("right", V.sum(dim=0))):
        basis, factor = state[f"{side}_basis"], state[side] / (1.0 - metric.decay**step)
        # The right side is fitted last, and the left one no longer quite.
        rtol = 1e-12 if side == "right" else 0.2
        torch.testing.assert_close(sums, (basis.T @ factor @ basis).diagonal(), rtol=rtol, atol=0.0)


def test_second_moments_that_are_fitted_are_nearer_to_the_variances_when_the_distribution_has_turned():
    scales = torch.tensor([100.0, 1.0, 0.01, 1e-4], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator(1), dtype=torch.float64)).Q
    given = [scales[:, None] * noise for noise in gradients(4, 6, steps=40)]
    given += [turn @ gradient for gradient in given[:10]]

    def error(metric: Metric) -> float:
        """Largest factor, as a logarithm, between the mean second moment of a row and the true one."""
        state: dict[str, Tensor] = {}
        for gradient in given:
            metric.unit_steps([state], [gradient])[0]
        in_basis = state["left_basis"].T @ turn
        wanted = (in_basis * scales).square().sum(dim=1)
        got = state["second_moment"].mean(dim=1) * state["unit"] ** 2
        return float((got / wanted).log().abs().max())

    assert error(Metric("kronecker")) < 0.5 * error(UnfittedMetric("kronecker"))


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 2), (4, 1), (7,), (), (0, 3), (3, 0)])
@pytest.mark.parametrize("name", METRICS)
def test_every_shape_has_finite_bounded_steps(name: MetricName, shape: tuple[int, ...]):
    for step, gradient in zip(steps_of(Metric(name), gradients(*shape)), gradients(*shape), strict=True):
        assert step.shape == gradient.shape
        assert bool((step.abs() <= 3.0).all())


@pytest.mark.parametrize("seed", range(24))
def test_gradients_with_many_zeros_have_sound_bases(seed: int):
    # Of these, eigh in fp32 fails on about one in six, by an error or by nan: see `_eigenvectors`.
    generator, metric, state = torch.Generator().manual_seed(seed), Metric(), {}
    dead = torch.rand(144, generator=generator) < 0.6
    for _ in range(3):
        gradient = torch.randn(32, 144, generator=generator).masked_fill_(dead, 0.0)
        assert bool(metric.unit_steps([state], [gradient])[0].isfinite().all())
    basis = state["right_basis"].double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(144, dtype=torch.float64), rtol=0.0, atol=1e-5)
    rotated = basis.T @ state["right"].double() @ basis
    assert float(rotated.triu(1).abs().max()) < 0.5 * float(rotated.diagonal().max())


def test_sides_beyond_the_limit_are_not_rotated():
    state: dict[str, Tensor] = {}
    Metric("kronecker", max_dimension=4).unit_steps([state], [gradients(5, 3)[0]])
    assert "left_basis" not in state
    assert state["right_basis"].shape == (3, 3)


@pytest.mark.parametrize("name", METRICS)
def test_gradients_that_vanish_or_begin_at_zero_are_no_trouble(name: MetricName):
    zero = torch.zeros(3, 4)
    given = [gradient.float() for gradient in gradients(3, 4)]
    fading = [gradient * 10.0 ** (-4 * step) for step, gradient in enumerate(given)]
    for series in ([zero, zero, *given], [*given, zero, zero], fading):
        assert all(bool((step.abs() <= 3.0).all()) for step in steps_of(Metric(name), series))
    assert bool((steps_of(Metric(name), [zero, zero])[-1] == 0.0).all())


def test_half_precision_is_computed_in_fp32():
    state: dict[str, Tensor] = {}
    (step,) = Metric().unit_steps([state], [gradients(3, 4)[0].bfloat16()])
    assert step.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in state.values() if isinstance(value, Tensor))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "shampoo"}, "metric='shampoo' must be one of identity, diagonal, kronecker"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"decay": -0.1}, r"decay=-0.1 must be in \[0, 1\)"),
        ({"refresh_every": 0}, "refresh_every=0 must be >= 1"),
        ({"max_dimension": 0}, "max_dimension=0 must be >= 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Metric(**options)
