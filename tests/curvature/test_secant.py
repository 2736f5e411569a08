import math
from collections.abc import Callable

import pytest
import torch
from reference import (
    F64,
    anderson_matrix,
    centred,
    displacements,
    normal,
    paper_inverse_hvp,
    quadratic,
    tanh_network,
)
from torch import Tensor

from replica_newton.curvature import SecantCurvature, exact_newton_step

# Condition numbers of G stay below about 100 here; the Gram matrix squares them: 1e4 · 2e-16, with a margin.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [(2, 1), (2, 5), (3, 2), (4, 9), (5, 4), (8, 5), (7, 3), (6, 40)]
INDEFINITE = [5.0, -3.0, 1.5, -0.8, 0.6, 2.0]


def unrelated(M: int, N: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Parameters and gradients that no Hessian connects: the formulas must hold for any numbers."""
    w = normal(N, seed=seed) + displacements(M, N, seed=seed + 1)
    return w, normal(N, seed=seed + 3) + 3.0 * displacements(M, N, seed=seed + 4, smallest=0.2)


@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_inverse_hvp_is_the_papers_formula_and_anderson_mixing(M: int, N: int) -> None:
    w, g = unrelated(M, N)
    curvature, z = SecantCurvature(w, g), normal(3, N, seed=9)
    result = curvature.inverse_hvp(z)
    torch.testing.assert_close(result, torch.stack([paper_inverse_hvp(w, g, row) for row in z]), **CLOSE)
    torch.testing.assert_close(result, z @ anderson_matrix(w, g).T, **CLOSE)
    assert result.dtype == F64


@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_singular_vectors_and_values_are_those_of_centred_gradients(M: int, N: int) -> None:
    w, g = unrelated(M, N)
    curvature = SecantCurvature(w, g)
    U, rank = curvature.left_singular_vectors, min(M - 1, N)
    assert curvature.rank == rank
    assert U.shape == (rank, N)
    torch.testing.assert_close(curvature.singular_values, torch.linalg.svdvals(centred(g))[:rank], **CLOSE)
    torch.testing.assert_close(U @ U.T, torch.eye(rank, dtype=F64), **CLOSE)
    G = centred(g)
    torch.testing.assert_close(U.T @ U, G @ torch.linalg.pinv(G, rtol=1e-9), **CLOSE)
    # u_i is the i-th singular vector, not only one of the span: G Gᵀ u_i = σ_i² u_i
    torch.testing.assert_close(U @ G @ G.T, curvature.singular_values.square().unsqueeze(1) * U, **CLOSE)


def test_two_replicas_give_the_rank_one_closed_form() -> None:
    w, g = unrelated(2, 6)
    d, y, z = w[1] - w[0], g[1] - g[0], normal(6, seed=7)
    curvature = SecantCurvature(w, g)
    torch.testing.assert_close(curvature.inverse_hvp(z), z + (d - y) * (y @ z) / (y @ y), **CLOSE)
    torch.testing.assert_close(curvature.hvp(z), z - (d - y) * (y @ z) / (y @ d), **CLOSE)
    assert curvature.singular_values.tolist() == pytest.approx([float(y.norm()) / math.sqrt(2.0)])
    assert curvature.eigenvalues.tolist() == pytest.approx([float((d @ y) / (d @ d))])


@pytest.mark.parametrize("method", ["inverse_hvp", "hvp"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_stacked_vectors_give_the_stack_of_products(method: str, damping: float) -> None:
    curvature = SecantCurvature(*unrelated(4, 9), damping=damping)
    z = normal(5, 9, seed=11)
    product = getattr(curvature, method)
    torch.testing.assert_close(product(z), torch.stack([product(row) for row in z]), **CLOSE)
    assert product(z[:0]).shape == (0, 9)


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("z_shape", [(9,), (3, 9)])
def test_step_coefficients_reproduce_the_product_from_raw_and_from_centred_rows(
    damping: float, z_shape: tuple[int, ...]
) -> None:
    w, g = unrelated(4, 9)
    z = normal(*z_shape, seed=12)
    curvature = SecantCurvature(w, g, damping=damping)
    alpha, beta = curvature.step_coefficients(z)
    assert alpha.shape == beta.shape == (*z_shape[:-1], 4)
    torch.testing.assert_close(z + alpha @ g + beta @ w, curvature.inverse_hvp(z), **CLOSE)
    torch.testing.assert_close(z + alpha @ centred(g).T + beta @ centred(w).T, curvature.inverse_hvp(z), **CLOSE)
    for weights in (alpha, beta):
        torch.testing.assert_close(weights.sum(dim=-1), torch.zeros(z_shape[:-1], dtype=F64), **CLOSE)


@pytest.mark.parametrize("spectrum", [[5.0, 2.0, 1.0, 0.5, 0.3, 0.1], INDEFINITE])
@pytest.mark.parametrize("M", [2, 4, 9])
def test_on_a_quadratic_the_product_is_exact_on_the_span_and_the_identity_across_it(
    spectrum: list[float], M: int
) -> None:
    H, w, g = quadratic(spectrum, M, seed=20)
    curvature, W, G = SecantCurvature(w, g), centred(w).T, centred(g).T
    torch.testing.assert_close(curvature.inverse_hvp(G), W, **CLOSE)
    torch.testing.assert_close(curvature.inverse_hvp(G), torch.linalg.solve(H, G.T).T, **CLOSE)
    across = normal(6, seed=21)
    across -= G.T @ torch.linalg.lstsq(G.T, across.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    torch.testing.assert_close(curvature.inverse_hvp(across), across, **CLOSE)


@pytest.mark.parametrize("M", [7, 9])
def test_with_as_many_differences_as_parameters_it_is_the_exact_newton_step(M: int) -> None:
    H, w, g = quadratic(INDEFINITE, M, seed=22)
    z = g.mean(dim=0)
    curvature = SecantCurvature(w, g)
    torch.testing.assert_close(curvature.inverse_hvp(z), exact_newton_step(H, z), **CLOSE)
    torch.testing.assert_close(curvature.hvp(z), H @ z, **CLOSE)


@pytest.mark.parametrize("damping", [0.0, 0.25])
@pytest.mark.parametrize(("M", "N"), [(2, 6), (4, 6), (7, 6), (9, 6)])
def test_hvp_inverts_inverse_hvp(M: int, N: int, damping: float) -> None:
    _, w, g = quadratic(INDEFINITE, M, seed=24)
    curvature, z = SecantCurvature(w, g, damping=damping), normal(4, N, seed=25)
    torch.testing.assert_close(curvature.hvp(curvature.inverse_hvp(z)), z, **CLOSE)
    torch.testing.assert_close(curvature.inverse_hvp(curvature.hvp(z)), z, **CLOSE)
    dense = torch.linalg.inv(anderson_matrix(w, g + damping * w))
    torch.testing.assert_close(curvature.hvp(z), z @ dense.T, **CLOSE)
    W, G = centred(w).T, centred(g).T
    torch.testing.assert_close(curvature.hvp(W), G + damping * W, **CLOSE)


@pytest.mark.parametrize("damping", [0.0, 0.25])
@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_hvp_is_the_dense_inverse_even_where_no_symmetric_hessian_connects_the_rows(
    M: int, N: int, damping: float
) -> None:
    w, g = unrelated(M, N, seed=5)
    curvature, z = SecantCurvature(w, g, damping=damping), normal(3, N, seed=10)
    dense = anderson_matrix(w, g + damping * w)
    torch.testing.assert_close(curvature.inverse_hvp(z), z @ dense.T, **CLOSE)
    # UᵀP need not be well conditioned here; with this seed the condition of the dense matrix is up to 50
    torch.testing.assert_close(curvature.hvp(z), torch.linalg.solve(dense, z.T).T, rtol=1e-9, atol=1e-9)


def test_hvp_leaves_alone_what_it_cannot_invert() -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64)  # H = [[0, 1], [1, 0]]: u = e₂ is orthogonal to p = e₁
    curvature, z = SecantCurvature(w, w.flip(1)), torch.tensor([3.0, 4.0], dtype=F64)
    assert curvature.inverse_hvp(z).tolist() == [7.0, 0.0]  # singular as a matrix
    assert curvature.hvp(z).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("damping", [0.01, 1.0, 30.0])
def test_damping_is_the_undamped_algebra_on_damped_gradients(damping: float) -> None:
    _, w, g = quadratic([4.0, 2.0, 1.0, 0.5, 0.1], 4, seed=26)
    z = normal(3, 5, seed=27)
    damped, explicit, undamped = (
        SecantCurvature(w, g, damping=damping),
        SecantCurvature(w, g + damping * w),
        SecantCurvature(w, g),
    )
    torch.testing.assert_close(damped.inverse_hvp(z), explicit.inverse_hvp(z), **CLOSE)
    torch.testing.assert_close(damped.hvp(z), explicit.hvp(z), **CLOSE)
    torch.testing.assert_close(damped.singular_values, explicit.singular_values, **CLOSE)
    torch.testing.assert_close(damped.inverse_hvp(z), z @ anderson_matrix(w, g + damping * w).T, **CLOSE)
    projectors = [
        curvature.left_singular_vectors.T @ curvature.left_singular_vectors for curvature in (damped, explicit)
    ]
    torch.testing.assert_close(*projectors, **CLOSE)
    assert torch.equal(damped.eigenvalues, undamped.eigenvalues)
    assert torch.equal(damped.residuals, undamped.residuals)
    assert damped.learning_rate == undamped.learning_rate


@pytest.mark.parametrize("damping", [0.1, 0.3, 1.0, 3.7])
def test_damping_that_cancels_the_curvature_leaves_no_direction_to_divide_by(damping: float) -> None:
    w = normal(4, 6, seed=28)
    curvature, z = SecantCurvature(w, -damping * w, damping=damping), normal(6, seed=29)
    assert curvature.rank == 0
    assert torch.equal(curvature.inverse_hvp(z), z)
    torch.testing.assert_close(curvature.eigenvalues, torch.full((3,), -damping, dtype=F64), **CLOSE)


@pytest.mark.parametrize("M", [2, 3, 5, 8])
def test_the_null_mode_of_equal_weights_is_dropped(M: int) -> None:
    _, w, g = quadratic(torch.linspace(1.0, 3.0, 20), M, seed=30)
    curvature, z = SecantCurvature(w, g, rtol=0.0), normal(20, seed=31)
    assert curvature.rank == M - 1
    assert float(curvature.singular_values.min()) > 0.1
    assert torch.isfinite(curvature.inverse_hvp(z)).all()
    torch.testing.assert_close(curvature.inverse_hvp(z), paper_inverse_hvp(w, g, z), **CLOSE)


def test_one_replica_shows_no_curvature() -> None:
    w, g, z = normal(3, 1, 7, seed=32)
    curvature = SecantCurvature(w, g, damping=0.5)
    assert curvature.rank == 0
    for product in (curvature.inverse_hvp(z), curvature.hvp(z)):
        assert torch.equal(product, z)
    for empty in (curvature.left_singular_vectors, curvature.eigenvectors):
        assert empty.shape == (0, 7)
    for empty in (curvature.singular_values, curvature.eigenvalues, curvature.residuals):
        assert empty.shape == (0,)
    assert [weights.tolist() for weights in curvature.step_coefficients(z[0])] == [[0.0], [0.0]]
    assert curvature.learning_rate == curvature.paper_learning_rate == math.inf


@pytest.mark.parametrize("noise", [0.0, 1.0, 1e-12])
def test_replicas_at_one_point_show_no_curvature_even_if_gradients_differ(noise: float) -> None:
    w = normal(1, 6, seed=33).expand(4, 6)
    g = normal(1, 6, seed=34) + noise * normal(4, 6, seed=35)
    curvature, z = SecantCurvature(w, g), normal(6, seed=36)
    assert curvature.rank == curvature.eigenvalues.numel() == curvature.eigenvectors.shape[0] == 0
    assert torch.equal(curvature.inverse_hvp(z), z)
    assert torch.equal(curvature.hvp(z), z)
    assert curvature.learning_rate == curvature.paper_learning_rate == math.inf


def test_equal_gradients_show_no_curvature_where_replicas_differ() -> None:
    w, z = normal(4, 6, seed=37), normal(6, seed=38)
    curvature = SecantCurvature(w, normal(1, 6, seed=39).expand(4, 6))
    assert curvature.rank == 0
    assert torch.equal(curvature.inverse_hvp(z), z)
    assert curvature.eigenvalues.tolist() == [0.0, 0.0, 0.0]
    assert curvature.learning_rate == curvature.paper_learning_rate == math.inf


def test_a_repeated_replica_adds_no_direction() -> None:
    H, w, g = quadratic(INDEFINITE, 4, seed=40)
    repeated = [0, 1, 2, 3, 2]
    curvature, distinct, z = SecantCurvature(w[repeated], g[repeated]), SecantCurvature(w, g), normal(6, seed=41)
    assert curvature.rank == curvature.eigenvalues.numel() == 3
    torch.testing.assert_close(curvature.inverse_hvp(z), paper_inverse_hvp(w[repeated], g[repeated], z), **CLOSE)
    torch.testing.assert_close(curvature.inverse_hvp(z), distinct.inverse_hvp(z), **CLOSE)
    torch.testing.assert_close(curvature.eigenvalues, distinct.eigenvalues, **CLOSE)
    image = H @ (w[0] - w[1])
    torch.testing.assert_close(curvature.inverse_hvp(image), w[0] - w[1], **CLOSE)


def test_equal_replicas_with_different_gradients_still_follow_the_formula() -> None:
    _, w, g = quadratic(INDEFINITE, 4, seed=42)
    w[3] = w[2]
    g[3] = g[2] + normal(6, seed=43)
    curvature, z = SecantCurvature(w, g), normal(6, seed=44)
    assert (curvature.rank, curvature.eigenvalues.numel()) == (3, 2)
    torch.testing.assert_close(curvature.inverse_hvp(z), paper_inverse_hvp(w, g, z), **CLOSE)
    # along their difference of gradients lies no displacement: the formula's answer is zero, and hvp's pseudo-inverse
    torch.testing.assert_close(curvature.inverse_hvp(g[3] - g[2]), torch.zeros(6, dtype=F64), **CLOSE)
    assert float(curvature.hvp(z).norm()) < 100.0 * float(z.norm())  # no division by what only rounding keeps from zero


@pytest.mark.parametrize("rtol", [1e-6, 1e-10, 0.0])
def test_a_singular_hessian_has_its_null_space_dropped(rtol: float) -> None:
    H, w, g = quadratic([3.0, -1.0, 0.0, 0.0, 0.0], 6, seed=45)
    curvature, z = SecantCurvature(w, g, rtol=rtol), normal(5, seed=46)
    assert curvature.rank == 2
    assert curvature.eigenvalues.numel() == 5
    torch.testing.assert_close(curvature.inverse_hvp(z), paper_inverse_hvp(w, g, z), **CLOSE)
    null = z - torch.linalg.pinv(H, hermitian=True, rtol=1e-9) @ H @ z
    torch.testing.assert_close(curvature.inverse_hvp(null), null, **CLOSE)
    image = H @ z
    torch.testing.assert_close(H @ curvature.inverse_hvp(image), image, **CLOSE)


@pytest.mark.parametrize("damping", [0.0, 1e6])
@pytest.mark.parametrize("rtol", [1e-6, 0.0])
def test_more_replicas_than_parameters_give_rank_n(rtol: float, damping: float) -> None:
    w, g = unrelated(9, 3)
    curvature = SecantCurvature(w, g, rtol=rtol, damping=damping)
    assert curvature.rank == curvature.eigenvalues.numel() == 3


def test_rtol_cuts_singular_values_relative_to_the_largest() -> None:
    w = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=F64)
    g = w * torch.tensor([1.0, 1e-2, 1e-4], dtype=F64)
    ranks = {rtol: SecantCurvature(w, g, rtol=rtol).rank for rtol in (1e-6, 1e-3, 1e-1)}
    assert ranks == {1e-6: 3, 1e-3: 2, 1e-1: 1}


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1.0, 1e3])
def test_the_spread_of_the_replicas_does_not_matter_on_a_quadratic(spread: float) -> None:
    H, w, g = quadratic(INDEFINITE, 4, seed=48, spread=spread)
    curvature, z = SecantCurvature(w, g), normal(6, seed=49)
    H1, w1, g1 = quadratic(INDEFINITE, 4, seed=48)
    assert torch.equal(H, H1)
    unit = SecantCurvature(w1, g1)
    # w and g are of order 1 (10 for g): their rounding, 1e-15, is 1e-9 of a spread of 1e-6, and 10 conditions it
    tolerance = {"rtol": 1e-10, "atol": max(1e-10, 1e-13 / spread)}
    torch.testing.assert_close(curvature.inverse_hvp(z), unit.inverse_hvp(z), **tolerance)
    torch.testing.assert_close(curvature.eigenvalues, unit.eigenvalues, **tolerance)
    # the paper's spectrum does scale
    torch.testing.assert_close(curvature.singular_values, spread * unit.singular_values, rtol=1e-8, atol=0.0)


@pytest.fixture(scope="module")
def network() -> tuple[Tensor, Tensor, Tensor, object]:
    problem = tanh_network()
    return problem.hessian, problem.w, displacements(5, problem.w.numel(), seed=50), problem


def test_on_a_tanh_network_the_product_inverts_the_exact_hessian(network: tuple) -> None:
    H, w0, Q, problem = network
    w = w0 + 1e-5 * Q
    curvature = SecantCurvature(w, problem.gradients(w))
    images = Q @ H
    # first order in the spread: 1e-5 times third derivatives of order 1
    torch.testing.assert_close(curvature.inverse_hvp(images), Q, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(curvature.hvp(Q), images, rtol=0.0, atol=1e-5)


def test_on_a_tanh_network_the_error_falls_linearly_with_the_spread_and_quadratically_if_symmetric(
    network: tuple,
) -> None:
    H, w0, Q, problem = network

    def errors(h: float) -> tuple[float, float]:
        g, mirrored = problem.gradients(w0 + h * Q), problem.gradients(w0 - h * Q)
        one_sided, symmetric_ = SecantCurvature(h * Q, g), SecantCurvature(h * Q, (g - mirrored) / 2)
        return tuple(float((curvature.inverse_hvp(Q @ H) - Q).norm()) for curvature in (one_sided, symmetric_))

    (coarse, coarse_symmetric), (fine, fine_symmetric) = errors(1e-2), errors(1e-3)
    assert 8.0 < coarse / fine < 12.0
    assert 80.0 < coarse_symmetric / fine_symmetric < 120.0


def test_displacements_whose_squares_underflow_are_still_displacements() -> None:
    W = torch.tensor([[0.0, 0.0], [1e-30, 0.0]])
    assert SecantCurvature(W, torch.tensor([[0.0, 0.0], [2.0, 0.0]])).rank == 1


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_the_squared_decrement_is_the_product_with_the_vector(M: int, N: int, damping: float) -> None:
    w, g = unrelated(M, N)
    curvature, z = SecantCurvature(w, g, damping=damping), normal(N, seed=9)
    assert curvature.squared_decrement(z) == pytest.approx(float(z @ curvature.inverse_hvp(z)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_columns_in_two_places_need_one_sum_for_the_vector_they_know(damping: float) -> None:
    w, g = unrelated(4, 9)
    whole, z = SecantCurvature(w, g, damping=damping), normal(9, seed=9)
    columns = [slice(0, 5), slice(5, 9)]
    # The sums of both places, as the first to be asked would have to wait for them.
    sums: list[list[Tensor]] = [[], []]
    for place, own in enumerate(columns):
        SecantCurvature(w[:, own], g[:, own], damping=damping, vector=z[own], total=_kept(sums[place]))
    total = sums[0][0] + sums[1][0]
    parts = []
    for own in columns:
        vector, calls = z[own], list[Tensor]()
        curvature = SecantCurvature(
            w[:, own], g[:, own], damping=damping, vector=vector, total=_kept(calls, answer=total)
        )
        parts.append(curvature.inverse_hvp(vector))
        assert curvature.squared_decrement(vector) == pytest.approx(whole.squared_decrement(z), rel=1e-9)
        assert len(calls) == 1, "one sum for all"
        assert curvature.parted
        torch.testing.assert_close(curvature.eigenvalues, whole.eigenvalues, **CLOSE)
    torch.testing.assert_close(torch.cat(parts), whole.inverse_hvp(z), **CLOSE)


def test_replicas_at_one_point_have_not_parted() -> None:
    w, g = unrelated(3, 5)
    assert SecantCurvature(w, g).parted
    assert not SecantCurvature(w[:1].expand(3, -1), g).parted


def _kept(sums: list[Tensor], *, answer: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    def total(one: Tensor) -> Tensor:
        sums.append(one)
        return one if answer is None else answer

    return total
