import pytest
import scipy.linalg
import torch
from reference import F64, centred, dense_ritz, displacements, normal, orthogonal, quadratic, symmetric, tanh_network
from torch import Tensor

from replica_newton.curvature import RitzPairs, SecantCurvature, rayleigh_ritz

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
SPECTRUM = [6.0, -4.0, 2.5, 1.0, -0.5, 0.2, 0.1]
# ‖H x‖² − θ² loses the digits of θ²: a residual of zero comes out as up to √2e-16 · |θ|, some 1e-7
RESIDUAL = {"rtol": 1e-8, "atol": 3e-7}


def pairs_of(w: Tensor, g: Tensor, *, rtol: float = 1e-6) -> RitzPairs:
    """Ritz pairs straight from Gram matrices of centred rows."""
    W, G = centred(w), centred(g)
    return rayleigh_ritz(W.T @ W, W.T @ G, G.T @ G, rtol=rtol)


@pytest.mark.parametrize("M", [2, 3, 5, 8])
def test_pairs_equal_the_dense_reference(M: int) -> None:
    _, w, g = quadratic(SPECTRUM, M, seed=0)
    curvature, dense = SecantCurvature(w, g), dense_ritz(w, g)
    assert curvature.eigenvalues.shape == (M - 1,)
    torch.testing.assert_close(curvature.eigenvalues, dense.values, **CLOSE)
    X = curvature.eigenvectors
    # eigenvectors up to sign: distinct Ritz values
    torch.testing.assert_close((X @ dense.vectors).abs(), torch.eye(M - 1, dtype=F64), **CLOSE)
    residuals = (dense.images - dense.vectors * dense.values).norm(dim=0)
    torch.testing.assert_close(curvature.residuals, residuals, **RESIDUAL)


@pytest.mark.parametrize("M", [3, 5, 8])
def test_values_and_vectors_equal_scipy_on_the_pencil(M: int) -> None:
    _, w, g = quadratic(SPECTRUM, M, seed=1)
    W, G = centred(w)[:, :-1], centred(g)[:, :-1]  # the pencil of all M centred rows is singular
    cross = W.T @ G
    values, coefficients = scipy.linalg.eigh(((cross + cross.T) / 2).numpy(), (W.T @ W).numpy())
    order = torch.as_tensor(abs(values)).argsort(descending=True)
    curvature = SecantCurvature(w, g)
    torch.testing.assert_close(curvature.eigenvalues, torch.as_tensor(values)[order], **CLOSE)
    vectors = W @ torch.as_tensor(coefficients)[:, order]
    torch.testing.assert_close((curvature.eigenvectors @ vectors).abs(), torch.eye(M - 1, dtype=F64), **CLOSE)


def test_an_asymmetric_cross_product_is_symmetrised() -> None:
    w, g = displacements(4, 9, seed=2), normal(4, 9, seed=3)  # no symmetric H connects them
    torch.testing.assert_close(SecantCurvature(w, g).eigenvalues, dense_ritz(w, g).values, **CLOSE)
    pairs = pairs_of(w, g)
    W, G = centred(w), centred(g)
    X, HX = W @ pairs.coefficients, G @ pairs.coefficients
    torch.testing.assert_close((X * HX).sum(dim=0), pairs.values, **CLOSE)
    torch.testing.assert_close((HX - X * pairs.values).norm(dim=0), pairs.residuals, **RESIDUAL)


@pytest.mark.parametrize("chosen", [[0], [1, 4], [0, 1, 2], [0, 1, 2, 3, 4, 5, 6]])
def test_displacements_of_an_invariant_subspace_give_exact_eigenpairs(chosen: list[int]) -> None:
    Q = orthogonal(7, seed=4)
    H = Q.T @ torch.tensor(SPECTRUM, dtype=F64).diag() @ Q
    w = displacements(len(chosen) + 1, len(chosen), seed=5) @ Q[chosen]
    curvature = SecantCurvature(w, w @ H)
    expected = torch.tensor([SPECTRUM[i] for i in chosen], dtype=F64)  # by magnitude already
    torch.testing.assert_close(curvature.eigenvalues, expected, **CLOSE)
    torch.testing.assert_close(curvature.residuals, torch.zeros(len(chosen), dtype=F64), **RESIDUAL)
    X = curvature.eigenvectors
    torch.testing.assert_close(X @ H, expected.unsqueeze(1) * X, **CLOSE)


@pytest.mark.parametrize("M", [2, 4, 7, 8])
def test_residuals_are_the_norms_they_claim_and_bound_the_distance_to_an_eigenvalue(M: int) -> None:
    H, w, g = quadratic(SPECTRUM, M, seed=6)
    curvature = SecantCurvature(w, g)
    X, theta, residuals = curvature.eigenvectors, curvature.eigenvalues, curvature.residuals
    torch.testing.assert_close(residuals, (X @ H - theta.unsqueeze(1) * X).norm(dim=1), **RESIDUAL)
    distances = (torch.linalg.eigvalsh(H) - theta.unsqueeze(1)).abs().amin(dim=1)
    assert bool((distances <= residuals + 1e-10).all())
    if M < 8:
        assert float(residuals.max()) > 0.1  # the bound is not met by being trivial


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_eigenvectors_are_orthonormal_and_lie_in_the_span_of_displacements(dtype: torch.dtype) -> None:
    _, w, g = quadratic(SPECTRUM, 5, seed=7)
    curvature = SecantCurvature(w.to(dtype), g.to(dtype))
    X = curvature.eigenvectors.double()
    tolerance = 1e-12 if dtype == F64 else 2e-6  # fp32 elements of size 1 after cancellation, condition 2
    torch.testing.assert_close(X @ X.T, torch.eye(4, dtype=F64), rtol=0.0, atol=tolerance)
    W = centred(w)
    torch.testing.assert_close(X @ W @ torch.linalg.pinv(W, rtol=1e-9), X, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_values_are_signed_and_ordered_by_magnitude(seed: int) -> None:
    _, w, g = quadratic(SPECTRUM, 8, seed=seed)
    values = SecantCurvature(w, g).eigenvalues
    torch.testing.assert_close(values, torch.tensor(SPECTRUM, dtype=F64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_signs_are_fixed_by_the_largest_coefficient(seed: int) -> None:
    _, w, g = quadratic(SPECTRUM, 5, seed=seed)
    curvature = SecantCurvature(w, g)
    coefficients = curvature.ritz_pairs.coefficients
    largest = coefficients.gather(0, coefficients.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close(coefficients.sum(dim=0), torch.zeros(4, dtype=F64), **CLOSE)
    torch.testing.assert_close(coefficients.T @ w, curvature.eigenvectors, **CLOSE)
    # the decomposition's own sign, which a rotation of the input may turn, must not come through
    Q = orthogonal(7, seed=20 + seed)
    torch.testing.assert_close(SecantCurvature(w @ Q, g @ Q).eigenvectors, curvature.eigenvectors @ Q, **CLOSE)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("M", [2, 4, 6])
def test_values_interlace_with_the_eigenvalues_of_the_hessian(M: int, seed: int) -> None:
    H, w, g = quadratic(SPECTRUM, M, seed=seed)
    theta = SecantCurvature(w, g).eigenvalues.sort().values
    eigenvalues = torch.linalg.eigvalsh(H)
    slack = 1e-12
    assert bool((theta >= eigenvalues[: M - 1] - slack).all())
    assert bool((theta <= eigenvalues[-(M - 1) :] + slack).all())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_pairs_do_not_depend_on_the_scale_of_the_displacements(scale: float) -> None:
    _, w, g = quadratic(SPECTRUM, 5, seed=8)
    unit, scaled = pairs_of(w, g), pairs_of(scale * w, scale * g)
    torch.testing.assert_close(scaled.values, unit.values, **CLOSE)
    torch.testing.assert_close(scaled.residuals, unit.residuals, **RESIDUAL)
    torch.testing.assert_close(scale * scaled.coefficients, unit.coefficients, **CLOSE)


def test_directions_shorter_than_rtol_are_dropped() -> None:
    w = torch.tensor([[1.0, 0, 0], [0, 1e-2, 0], [0, 0, 1e-4], [0, 0, 0]], dtype=F64)
    g = w * torch.tensor([1.0, -2.0, 3.0], dtype=F64)
    orders = {rtol: pairs_of(w, g, rtol=rtol).values.numel() for rtol in (0.0, 1e-6, 1e-3, 1e-1)}
    assert orders == {0.0: 3, 1e-6: 3, 1e-3: 2, 1e-1: 1}
    assert {rtol: SecantCurvature(w, g, rtol=rtol).eigenvalues.numel() for rtol in orders} == orders


@pytest.mark.parametrize("rtol", [0.0, 1e-12, 1e-6])
@pytest.mark.parametrize(("M", "N"), [(6, 2), (9, 3), (8, 1)])
def test_rounding_never_passes_for_a_direction(M: int, N: int, rtol: float) -> None:
    w = 5.0 + displacements(M, N, seed=9)
    H = symmetric([2.0, -3.0, 1.0][:N], seed=10)
    pairs = pairs_of(w, w @ H, rtol=rtol)
    assert pairs.values.numel() == N
    torch.testing.assert_close(pairs.values.sort().values, torch.linalg.eigvalsh(H), **CLOSE)


@pytest.mark.parametrize("M", [1, 2, 4])
def test_replicas_at_one_point_have_no_pairs(M: int) -> None:
    zero = torch.zeros(M, M, dtype=F64)
    pairs = rayleigh_ritz(zero, zero, torch.eye(M, dtype=F64), rtol=1e-6)
    assert pairs.values.shape == pairs.residuals.shape == (0,)
    assert pairs.coefficients.shape == (M, 0)


def test_a_negative_eigenvalue_keeps_its_sign_where_the_singular_value_has_none() -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    curvature = SecantCurvature(w, w * torch.tensor([-5.0, 2.0], dtype=F64))
    torch.testing.assert_close(curvature.eigenvalues, torch.tensor([-5.0, 2.0], dtype=F64), **CLOSE)
    torch.testing.assert_close(curvature.eigenvectors.abs(), torch.eye(2, dtype=F64), **CLOSE)
    assert bool((curvature.singular_values > 0).all())


def test_a_repeated_eigenvalue_gives_orthonormal_vectors() -> None:
    _, w, g = quadratic([3.0, 3.0, 3.0, -3.0], 5, seed=11)
    curvature = SecantCurvature(w, g)
    X = curvature.eigenvectors
    torch.testing.assert_close(X @ X.T, torch.eye(4, dtype=F64), **CLOSE)
    assert curvature.eigenvalues.sort().values.tolist() == pytest.approx([-3.0, 3.0, 3.0, 3.0])


def test_on_a_tanh_network_top_eigenpairs_of_the_exact_hessian_are_found() -> None:
    network = tanh_network()
    eigenvalues, eigenvectors = torch.linalg.eigh(network.hessian)
    top = eigenvalues.abs().argsort(descending=True)[:4]
    w = network.w + 1e-5 * displacements(5, 4, seed=12) @ eigenvectors[:, top].T
    curvature = SecantCurvature(w, network.gradients(w))
    # first order in the spread: 1e-5 times third derivatives of order 1
    torch.testing.assert_close(curvature.eigenvalues, eigenvalues[top], rtol=0.0, atol=1e-5)
    assert float(curvature.residuals.max()) < 2e-5
    assert curvature.learning_rate == pytest.approx(1.0 / float(eigenvalues.abs().max()), rel=1e-4)


def test_on_a_tanh_network_values_converge_linearly_and_quadratically_if_symmetric() -> None:
    network = tanh_network()
    Q = displacements(5, network.w.numel(), seed=13)
    expected = dense_ritz(Q, Q @ network.hessian).values

    def errors(h: float) -> list[float]:
        g, mirrored = network.gradients(network.w + h * Q), network.gradients(network.w - h * Q)
        return [float((SecantCurvature(h * Q, G).eigenvalues - expected).norm()) for G in (g, (g - mirrored) / 2)]

    (coarse, coarse_symmetric), (fine, fine_symmetric) = errors(1e-2), errors(1e-3)
    assert 8.0 < coarse / fine < 12.0
    assert 80.0 < coarse_symmetric / fine_symmetric < 120.0


def test_pairs_are_fp64_even_from_fp32_rows() -> None:
    _, w, g = quadratic(SPECTRUM, 4, seed=14)
    curvature = SecantCurvature(w.float(), g.float())
    pairs = curvature.ritz_pairs
    assert {pairs.values.dtype, pairs.coefficients.dtype, pairs.residuals.dtype} == {F64}
    assert curvature.learning_rate == 1.0 / float(pairs.values.abs().max())
