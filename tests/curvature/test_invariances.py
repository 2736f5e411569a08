"""What must not change the curvature, or must change it by a known law, for any replicas of a quadratic."""

from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import F64, displacements, normal, orthogonal, symmetric
from torch import Tensor

from replica_newton.curvature import SecantCurvature

# Conditions of H and W stay below 10 and 2; the Gram matrix squares their product: 400 · 2e-16, with a margin.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
RESIDUAL = {"rtol": 1e-7, "atol": 1e-6}  # residuals lose half the digits of |θ| <= 5


class Case(NamedTuple):
    """Replicas of a quadratic that stand around the origin, and a vector."""

    H: Tensor
    w: Tensor
    g: Tensor
    z: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    M, N = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**20))
    magnitudes = draw(st.lists(st.floats(0.5, 5.0), min_size=N, max_size=N))
    signs = draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=N, max_size=N))
    H = symmetric([sign * magnitude for sign, magnitude in zip(signs, magnitudes, strict=True)], seed=seed)
    w = displacements(M, N, seed=seed + 1)
    return Case(H, w, w @ H, normal(N, seed=seed + 3))


def assert_same_spectrum(left: Tensor, right: Tensor) -> None:
    """Compare eigenvalues as sets: rounding decides the order of θ and −θ."""
    torch.testing.assert_close(left.sort().values, right.sort().values, **CLOSE)


def assert_same(left: SecantCurvature, right: SecantCurvature, z: Tensor) -> None:
    torch.testing.assert_close(left.inverse_hvp(z), right.inverse_hvp(z), **CLOSE)
    assert_same_spectrum(left.eigenvalues, right.eigenvalues)
    # single residuals are arbitrary within a repeated θ, their sum of squares is not
    torch.testing.assert_close(left.residuals.norm(), right.residuals.norm(), **RESIDUAL)
    torch.testing.assert_close(left.singular_values, right.singular_values, **CLOSE)


@given(cases(), st.floats(-100.0, 100.0), st.floats(-100.0, 100.0))
def test_a_common_shift_of_parameters_or_gradients_changes_nothing(case: Case, along_w: float, along_g: float) -> None:
    shift = normal(2, case.z.numel(), seed=7)
    shifted = SecantCurvature(case.w + along_w * shift[0], case.g + along_g * shift[1])
    assert_same(shifted, SecantCurvature(case.w, case.g), case.z)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_replicas_changes_nothing(case: Case, random: object) -> None:
    order = list(range(case.w.shape[0]))
    random.shuffle(order)
    permuted, plain = SecantCurvature(case.w[order], case.g[order]), SecantCurvature(case.w, case.g)
    assert_same(permuted, plain, case.z)
    for weights, expected in zip(permuted.step_coefficients(case.z), plain.step_coefficients(case.z), strict=True):
        torch.testing.assert_close(weights, expected[order], **CLOSE)


@given(cases(), st.floats(1e-3, 1e3), st.sampled_from([-1.0, 1.0]))
def test_replicas_further_apart_show_the_same_hessian(case: Case, scale: float, sign: float) -> None:
    s = sign * scale
    scaled, plain = SecantCurvature(s * case.w, s * case.g), SecantCurvature(case.w, case.g)
    torch.testing.assert_close(scaled.inverse_hvp(case.g), case.w, **CLOSE)
    torch.testing.assert_close(scaled.inverse_hvp(case.z), plain.inverse_hvp(case.z), **CLOSE)
    assert_same_spectrum(scaled.eigenvalues, plain.eigenvalues)
    torch.testing.assert_close(scaled.residuals.norm(), plain.residuals.norm(), **RESIDUAL)
    torch.testing.assert_close(scaled.singular_values, scale * plain.singular_values, **CLOSE)


@given(cases(), st.floats(1e-2, 1e2), st.sampled_from([-1.0, 1.0]))
def test_gradients_times_t_are_a_hessian_times_t(case: Case, scale: float, sign: float) -> None:
    t = sign * scale
    scaled, plain = SecantCurvature(case.w, t * case.g), SecantCurvature(case.w, case.g)
    assert_same_spectrum(scaled.eigenvalues, t * plain.eigenvalues)
    torch.testing.assert_close(scaled.singular_values, scale * plain.singular_values, **CLOSE)
    # Ĥ⁻¹ = I across the span and 1/t of the old one on it; the span of G itself is unchanged
    U = plain.left_singular_vectors
    on_span = (case.z @ U.T) @ U
    across = case.z - on_span
    torch.testing.assert_close(
        scaled.inverse_hvp(case.z), across + plain.inverse_hvp(on_span) / t, rtol=1e-10, atol=1e-10 / min(scale, 1.0)
    )


@given(cases(), st.integers(0, 2**20))
def test_an_orthogonal_change_of_coordinates_turns_the_results(case: Case, seed: int) -> None:
    Q = orthogonal(case.z.numel(), seed=seed)
    turned, plain = SecantCurvature(case.w @ Q, case.g @ Q), SecantCurvature(case.w, case.g)
    torch.testing.assert_close(turned.inverse_hvp(case.z @ Q), plain.inverse_hvp(case.z) @ Q, **CLOSE)
    assert_same_spectrum(turned.eigenvalues, plain.eigenvalues)
    torch.testing.assert_close(turned.singular_values, plain.singular_values, **CLOSE)


@given(cases())
def test_any_mixture_of_differences_spans_the_same_curvature(case: Case) -> None:
    M = case.w.shape[0]
    mixture = torch.eye(M, dtype=F64) + 0.3 * orthogonal(M, seed=5)
    mixture = mixture / mixture.sum(dim=1, keepdim=True) if M > 1 else torch.ones(1, 1, dtype=F64)
    mixed, plain = SecantCurvature(mixture @ case.w, mixture @ case.g), SecantCurvature(case.w, case.g)
    assert mixed.rank == plain.rank == min(M - 1, case.z.numel())
    torch.testing.assert_close(mixed.inverse_hvp(case.z), plain.inverse_hvp(case.z), rtol=1e-9, atol=1e-9)
    assert_same_spectrum(mixed.eigenvalues, plain.eigenvalues)


@given(cases())
def test_the_product_inverts_the_hessian_on_what_it_has_seen_and_nothing_is_ever_nan(case: Case) -> None:
    curvature = SecantCurvature(case.w, case.g)
    torch.testing.assert_close(curvature.inverse_hvp(case.w @ case.H), case.w, **CLOSE)
    torch.testing.assert_close(curvature.hvp(case.w), case.w @ case.H, **CLOSE)
    torch.testing.assert_close(curvature.hvp(curvature.inverse_hvp(case.z)), case.z, rtol=1e-8, atol=1e-8)
    lowest, highest = torch.linalg.eigvalsh(case.H)[[0, -1]].tolist()
    assert all(lowest - 1e-9 <= value <= highest + 1e-9 for value in curvature.eigenvalues.tolist())
