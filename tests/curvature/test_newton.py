import pytest
import torch
from reference import F64, normal, orthogonal, quadratic, symmetric
from torch import Tensor

from replica_newton.curvature import SecantCurvature, exact_newton_step, saddle_free_inverse_hvp

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
INF, NAN = float("inf"), float("nan")


def pairs(spectrum: list[float], N: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Eigenvalues and as many orthonormal rows of N elements."""
    return torch.tensor(spectrum, dtype=F64), orthogonal(N, seed=seed)[: len(spectrum)]


def test_saddle_free_closed_form_divides_by_magnitudes_and_leaves_the_rest() -> None:
    product = saddle_free_inverse_hvp(
        torch.tensor([4.0, -2.0]), torch.eye(2, 3), torch.tensor([8.0, 6.0, 5.0]), damping=1.0, bulk_rate=0.5
    )
    assert product.tolist() == pytest.approx([8.0 / 5.0, 6.0 / 3.0, 2.5])


def test_saddle_free_on_all_eigenpairs_is_the_inverse_of_the_absolute_hessian() -> None:
    H = symmetric([5.0, 2.0, 0.5, -0.25, -3.0], seed=1)
    values, vectors = torch.linalg.eigh(H)
    z = normal(5, seed=2)
    absolute = torch.linalg.svd(H)  # for symmetric H, |H| = V Σ Vᵀ: an independent way to it
    expected = torch.linalg.solve(absolute.Vh.T @ absolute.S.diag() @ absolute.Vh, z)
    torch.testing.assert_close(saddle_free_inverse_hvp(values, vectors.T, z), expected, **CLOSE)


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("bulk_rate", [0.0, 0.3, 1.0, 7.0])
def test_saddle_free_equals_the_dense_matrix(damping: float, bulk_rate: float) -> None:
    values, X = pairs([7.0, -3.0, 0.2], 6)
    z = normal(4, 6, seed=3)
    dense = bulk_rate * (torch.eye(6, dtype=F64) - X.T @ X) + X.T @ (1.0 / (values.abs() + damping)).diag() @ X
    result = saddle_free_inverse_hvp(values, X, z, damping=damping, bulk_rate=bulk_rate)
    torch.testing.assert_close(result, z @ dense, **CLOSE)
    stacked = [saddle_free_inverse_hvp(values, X, row, damping=damping, bulk_rate=bulk_rate) for row in z]
    torch.testing.assert_close(result, torch.stack(stacked), **CLOSE)


@pytest.mark.parametrize("tiny", [0.0, 1e-7, -1e-7])
def test_saddle_free_counts_vanishing_eigenvalues_as_bulk(tiny: float) -> None:
    values, X = pairs([2.0, tiny], 4)
    product = saddle_free_inverse_hvp(values, X, X[1], bulk_rate=3.0)
    torch.testing.assert_close(product, 3.0 * X[1], **CLOSE)


def test_saddle_free_keeps_an_eigenvalue_just_above_the_cut_off() -> None:
    values, X = pairs([2.0, 2.1e-3], 4)
    torch.testing.assert_close(saddle_free_inverse_hvp(values, X, X[1], rtol=1e-3), X[1] / 2.1e-3, **CLOSE)
    torch.testing.assert_close(saddle_free_inverse_hvp(values, X, X[1], rtol=1.1e-3), X[1], **CLOSE)


def test_saddle_free_divides_a_zero_eigenvalue_by_the_damping() -> None:
    values, X = pairs([2.0, 0.0], 4)
    torch.testing.assert_close(saddle_free_inverse_hvp(values, X, X[1], damping=0.5), 2.0 * X[1], **CLOSE)


def test_saddle_free_with_zero_eigenvalues_alone_is_the_bulk_rate() -> None:
    values, X = pairs([0.0, 0.0], 3)
    z = normal(3, seed=4)
    torch.testing.assert_close(saddle_free_inverse_hvp(values, X, z, bulk_rate=2.0), 2.0 * z, **CLOSE)


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_saddle_free_without_eigenpairs_is_the_bulk_rate(shape: tuple[int, ...]) -> None:
    z = normal(*shape, seed=5)
    product = saddle_free_inverse_hvp(torch.empty(0), torch.empty(0, 5, dtype=F64), z, bulk_rate=0.25)
    torch.testing.assert_close(product, 0.25 * z, **CLOSE)


def test_saddle_free_result_has_the_dtype_of_the_eigenvectors() -> None:
    values, X = pairs([2.0, -1.0], 4)
    assert saddle_free_inverse_hvp(values, X.float(), normal(4, seed=6)).dtype == torch.float32
    assert saddle_free_inverse_hvp(values, X, normal(4, seed=6).float()).dtype == F64


def test_saddle_free_keeps_fp32_precision_under_autocast() -> None:
    values, X = pairs([2.0, -0.5], 40)
    z = normal(40, seed=7).float()
    expected = saddle_free_inverse_hvp(values, X.float(), z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(saddle_free_inverse_hvp(values, X.float(), z), expected)


def test_saddle_free_does_not_hide_a_nan_eigenvalue() -> None:
    product = saddle_free_inverse_hvp(torch.tensor([2.0, NAN]), torch.eye(2), torch.ones(2))
    assert bool(product.isnan().any())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"damping": -0.5}, "damping=-0.5 must be finite and >= 0"),
        ({"damping": NAN}, "damping=nan must be"),
        ({"damping": INF}, "damping=inf must be"),
        ({"bulk_rate": -1.0}, "bulk_rate=-1.0 must be finite and >= 0"),
        ({"bulk_rate": NAN}, "bulk_rate=nan must be"),
        ({"rtol": 1.0}, r"rtol=1.0 must be in \[0, 1\)"),
        ({"rtol": -0.1}, "rtol=-0.1 must be in"),
        ({"eigenvalues": torch.ones(3)}, r"got \(3,\), \(2, 4\) and \(4,\)"),
        ({"eigenvectors": torch.ones(4)}, r"got \(2,\), \(4,\) and \(4,\)"),
        ({"z": torch.ones(5)}, r"got \(2,\), \(2, 4\) and \(5,\)"),
        ({"z": torch.tensor(1.0)}, r"got \(2,\), \(2, 4\) and \(\)"),
    ],
)
def test_saddle_free_errors_name_rule_and_value(changes: dict[str, object], message: str) -> None:
    arguments = {"eigenvalues": torch.ones(2), "eigenvectors": torch.eye(2, 4), "z": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        saddle_free_inverse_hvp(**(arguments | changes))


def test_saddle_free_descends_on_indefinite_quadratics_where_the_literal_step_often_climbs() -> None:
    uphill = 0
    trials = 40
    for seed in range(trials):
        H, w, g = quadratic(normal(6, seed=seed), 7, seed=100 + seed)
        curvature, z = SecantCurvature(w, g), g.mean(dim=0)
        uphill += int(curvature.inverse_hvp(z) @ z < 0)
        few = SecantCurvature(w[:4], g[:4])
        for seen in (curvature, few):
            step = saddle_free_inverse_hvp(seen.eigenvalues, seen.eigenvectors, z, rtol=0.0)
            # positive definite: at least the step in the sharpest direction, or at rate 1 outside
            bound = min(1.0, 1.0 / float(torch.linalg.eigvalsh(H).abs().max()))
            assert float(step @ z) >= 0.999 * bound * float(z @ z)
    # zᵀH⁻¹z takes both signs; "about half" (method, section 2, item 4): 40 fair tosses stay within 10..30 in 99.8 %
    assert trials // 4 <= uphill <= 3 * trials // 4


def test_literal_step_climbs_towards_the_saddle_and_saddle_free_leaves_it() -> None:
    w = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 2.0]], dtype=F64)
    g = w * torch.tensor([1.0, -2.0], dtype=F64)  # f = (x² − 2y²) / 2, the saddle at the origin
    z = torch.tensor([0.0, -2.0], dtype=F64)  # the gradient at (0, 1)
    curvature = SecantCurvature(w, g)
    torch.testing.assert_close(curvature.inverse_hvp(z), torch.tensor([0.0, 1.0], dtype=F64), **CLOSE)
    leaving = saddle_free_inverse_hvp(curvature.eigenvalues, curvature.eigenvectors, z)
    torch.testing.assert_close(leaving, torch.tensor([0.0, -1.0], dtype=F64), **CLOSE)


@pytest.mark.parametrize("spectrum", [[3.0], [5.0, 1.0, 0.01], [4.0, -2.0, 1.0, -0.5]])
def test_exact_newton_step_reaches_the_stationary_point(spectrum: list[float]) -> None:
    H = symmetric(spectrum, seed=8)
    minimum, w = normal(2, len(spectrum), seed=9)
    torch.testing.assert_close(w - exact_newton_step(H, H @ (w - minimum)), minimum, rtol=1e-11, atol=1e-11)


def test_exact_newton_step_keeps_the_dtype() -> None:
    assert exact_newton_step(torch.eye(2), torch.ones(2)).dtype == torch.float32
    assert exact_newton_step(2.0 * torch.eye(2, dtype=F64), torch.ones(2, dtype=F64)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("hessian", "gradient", "message"),
    [
        (torch.eye(2), torch.ones(3), r"\(N, N\) and gradient \(N,\).* got \(2, 2\) and \(3,\)"),
        (torch.ones(2, 3), torch.ones(2), r"got \(2, 3\) and \(2,\)"),
        (torch.eye(2), torch.ones(2, 1), r"got \(2, 2\) and \(2, 1\)"),
        (torch.empty(0, 0), torch.empty(0), r"N >= 1; got \(0, 0\) and \(0,\)"),
        (torch.zeros(2, 2), torch.ones(2), "non-singular"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.ones(2), "non-singular.* from 0 to 1"),
        (torch.full((2, 2), NAN), torch.ones(2), "must be finite"),
        (torch.tensor([[INF, 0.0], [0.0, 1.0]]), torch.ones(2), "must be finite"),
    ],
)
def test_exact_newton_step_errors_name_rule_and_value(hessian: Tensor, gradient: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_newton_step(hessian, gradient)


@pytest.mark.parametrize("seed", range(5))
def test_exact_newton_step_refuses_hessians_singular_up_to_rounding(seed: int) -> None:
    with pytest.raises(ValueError, match="non-singular"):
        exact_newton_step(symmetric([4.0, 1.0, -1.0, 0.0, 0.0], seed=seed), torch.ones(5, dtype=F64))
