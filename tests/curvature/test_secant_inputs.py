import math
from collections.abc import Callable

import pytest
import torch
from reference import F64, displacements, normal, paper_inverse_hvp, quadratic
from torch import Tensor

from replica_newton.curvature import SecantCurvature

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
SPECTRUM = [4.0, 2.0, -1.0, 0.7, 1.5, 3.0]
NAN, INF = float("nan"), float("inf")

N_SIZED: dict[str, Callable[[SecantCurvature, Tensor], Tensor]] = {
    "inverse_hvp": SecantCurvature.inverse_hvp,
    "hvp": SecantCurvature.hvp,
    "left_singular_vectors": lambda curvature, _: curvature.left_singular_vectors,
    "eigenvectors": lambda curvature, _: curvature.eigenvectors,
}
M_SIZED: dict[str, Callable[[SecantCurvature, Tensor], Tensor]] = {
    "singular_values": lambda curvature, _: curvature.singular_values,
    "eigenvalues": lambda curvature, _: curvature.eigenvalues,
    "residuals": lambda curvature, _: curvature.residuals,
    "alpha": lambda curvature, z: curvature.step_coefficients(z)[0],
    "beta": lambda curvature, z: curvature.step_coefficients(z)[1],
}


def replicas(dtype: torch.dtype = F64, *, M: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters, gradients and a vector of the given dtype."""
    _, w, g = quadratic(SPECTRUM, M, seed=0)
    return w.to(dtype), g.to(dtype), normal(6, seed=10).to(dtype)


# Sums in fp32 round by 6e-8 a term; the condition number of G, up to 10, and elements up to 5 make that 1e-5.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)]
)
def test_every_dtype_gives_the_fp64_result_of_the_same_rounded_input(dtype: torch.dtype, tolerance: float) -> None:
    w, g, z = replicas(dtype)
    curvature, exact = SecantCurvature(w, g), SecantCurvature(w.double(), g.double())
    expected = paper_inverse_hvp(w, g, z)
    torch.testing.assert_close(curvature.inverse_hvp(z).double(), expected, rtol=tolerance, atol=tolerance)
    for name, quantity in (N_SIZED | M_SIZED).items():
        close = {"rtol": tolerance, "atol": 2 * tolerance, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(quantity(curvature, z).double(), quantity(exact, z.double()).double(), **close)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(F64, F64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("device", DEVICES)
def test_results_have_the_documented_dtype_and_device(dtype: torch.dtype, expected: torch.dtype, device: str) -> None:
    w, g, z = (tensor.to(device) for tensor in replicas(dtype))
    curvature = SecantCurvature(w, g)
    for quantity in N_SIZED.values():
        assert (quantity(curvature, z).dtype, quantity(curvature, z).device.type) == (expected, device)
    for quantity in M_SIZED.values():
        assert (quantity(curvature, z).dtype, quantity(curvature, z).device.type) == (F64, "cpu")


@pytest.mark.parametrize("name", ["inverse_hvp", "hvp"])
def test_a_product_is_fp64_if_any_input_is(name: str) -> None:
    w, g, z = replicas()
    for inputs in ((w, g.float(), z.float()), (w.float(), g, z.float()), (w.float(), g.float(), z)):
        assert N_SIZED[name](SecantCurvature(*inputs[:2]), inputs[2]).dtype == F64


def test_differences_far_below_a_common_shift_stay_exact_in_fp32() -> None:
    step = 2.0**-13  # the spacing of fp32 numbers around 1024 and above: parameters a few spacings apart
    integers = torch.randint(-8, 9, (5, 30), generator=torch.Generator().manual_seed(1)).double()
    common = 1024.0 + 8.0 * torch.rand(30, generator=torch.Generator().manual_seed(2))
    offsets = step * integers
    w = common + offsets.float()
    assert torch.equal((w - common).double(), offsets)
    g = torch.linspace(1.0, 3.0, 30) * offsets.float()
    z = normal(30, seed=3).float()
    expected = SecantCurvature(offsets, g.double())
    curvature = SecantCurvature(w, g)
    # fp32 rounding of the results alone; combining w itself in fp32 would be wrong by the spacing of its elements
    torch.testing.assert_close(curvature.inverse_hvp(z).double(), expected.inverse_hvp(z), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(curvature.eigenvalues, expected.eigenvalues, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("which", ["W", "G"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("replica", [0, 2])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_a_non_finite_element_is_reported_with_matrix_replica_and_value(
    which: str, value: float, replica: int, dtype: torch.dtype
) -> None:
    w, g, _ = replicas(dtype)
    rows = {"W": w, "G": g}
    rows[which][replica, 3] = value
    with pytest.raises(ValueError, match=rf"^{which} must be finite; replica {replica} holds {value} \(1 elements\)$"):
        SecantCurvature(rows["W"].requires_grad_(), rows["G"])


def test_the_first_replica_with_a_non_finite_element_is_named_with_its_count() -> None:
    w, g, _ = replicas()
    g[1, 2:5], g[3, 0] = INF, NAN
    with pytest.raises(ValueError, match=r"^G must be finite; replica 1 holds inf \(3 elements\)$"):
        SecantCurvature(w, g)


@pytest.mark.parametrize("which", ["W", "G"])
def test_a_difference_that_overflows_is_reported_with_matrix_and_replica(which: str) -> None:
    w, g, _ = replicas(torch.float32)
    rows = {"W": w, "G": g}
    rows[which][0, 3], rows[which][1, 3] = -3e38, 3e38
    with pytest.raises(
        ValueError, match=rf"^differences between replicas in {which} must be finite; replica 1 holds inf"
    ):
        SecantCurvature(rows["W"], rows["G"])


def test_finite_elements_whose_sum_overflows_are_accepted() -> None:
    g = torch.tensor([[0.0, 0, 0], [3e38, 0, 0], [0, 3e38, 0]])
    assert SecantCurvature(torch.eye(3), g).rank == 2


@pytest.mark.parametrize("which", ["W", "G"])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.ones(4, 6, dtype=torch.int64), TypeError, "dense real floating-point tensor, got .*torch.int64"),
        (torch.ones(4, 6, dtype=torch.bool), TypeError, "torch.bool"),
        (torch.ones(4, 6, dtype=torch.complex64), TypeError, "torch.complex64"),
        (torch.ones(4, 6).to_sparse(), TypeError, "torch.sparse_coo"),
        ([[1.0, 2.0]], TypeError, "got list"),
        (torch.ones(6), ValueError, r"shape \(M, N\), one row a replica, M, N >= 1; got \(6,\)"),
        (torch.ones(2, 4, 6), ValueError, r"got \(2, 4, 6\)"),
        (torch.ones(0, 6), ValueError, r"got \(0, 6\)"),
        (torch.ones(4, 0), ValueError, r"got \(4, 0\)"),
    ],
    ids=["integer", "bool", "complex", "sparse", "list", "1d", "3d", "no-replicas", "no-parameters"],
)
def test_rows_of_the_wrong_kind_are_refused_by_name(
    which: str, bad: object, error: type[Exception], message: str
) -> None:
    good = torch.ones(4, 6)
    arguments = {"W": good, "G": good} | {which: bad}
    with pytest.raises(error, match=f"^{which} must .*{message}"):
        SecantCurvature(**arguments)


@pytest.mark.parametrize("shape", [(4, 5), (3, 6), (1, 6)])
def test_rows_of_different_shapes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"must agree .*\(4, 6\) on cpu and \({shape[0]}, {shape[1]}\) on cpu"):
        SecantCurvature(torch.ones(4, 6), torch.ones(shape))


def test_rows_on_different_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must agree in shape and device; got .* on cpu and .* on meta"):
        SecantCurvature(torch.ones(4, 6), torch.ones(4, 6, device="meta"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("rtol", -1e-9), ("rtol", 1.0), ("rtol", NAN), ("damping", -0.1), ("damping", INF), ("damping", NAN)],
)
def test_rtol_and_damping_out_of_range_are_refused(argument: str, value: float) -> None:
    w, g, _ = replicas()
    with pytest.raises(ValueError, match=f"^{argument}={value} must be"):
        SecantCurvature(w, g, **{argument: value})


@pytest.mark.parametrize("method", ["inverse_hvp", "hvp", "step_coefficients"])
@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        (torch.ones(5), ValueError, r"shape \(N,\) or \(k, N\) with N=6, got \(5,\)"),
        (torch.ones(6, 2), ValueError, r"got \(6, 2\)"),
        (torch.ones(2, 3, 6), ValueError, r"got \(2, 3, 6\)"),
        (torch.tensor(1.0), ValueError, r"got \(\)"),
        (torch.ones(6, dtype=torch.int64), TypeError, "torch.int64"),
        (torch.ones(6, dtype=torch.complex128), TypeError, "torch.complex128"),
        (torch.ones(6).to_sparse(), TypeError, "torch.sparse_coo"),
        ([1.0] * 6, TypeError, "got list"),
    ],
    ids=["short", "transposed", "3d", "scalar", "integer", "complex", "sparse", "list"],
)
def test_vectors_of_the_wrong_kind_are_refused(method: str, z: object, error: type[Exception], message: str) -> None:
    w, g, _ = replicas()
    with pytest.raises(error, match=f"^z must .*{message}"):
        getattr(SecantCurvature(w, g), method)(z)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_later_changes_of_the_inputs_do_not_reach_the_object(dtype: torch.dtype) -> None:
    w, g, z = replicas(dtype)
    expected = SecantCurvature(w.clone(), g.clone())
    curvature = SecantCurvature(w, g)
    w.mul_(-3.0).add_(1.0)
    g.zero_()
    for quantity in (N_SIZED | M_SIZED).values():
        assert torch.equal(quantity(curvature, z), quantity(expected, z))


def test_changes_of_the_results_do_not_reach_the_object() -> None:
    w, g, z = replicas()
    curvature, before = SecantCurvature(w, g), z.clone()
    for quantity in (N_SIZED | M_SIZED).values():
        expected = quantity(curvature, z).clone()
        quantity(curvature, z).zero_()
        assert torch.equal(quantity(curvature, z), expected)
    assert torch.equal(z, before)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_inputs_that_require_gradients_give_results_without_a_graph(damping: float) -> None:
    w, g, z = (tensor.requires_grad_() for tensor in replicas())
    curvature = SecantCurvature(w, g, damping=damping)
    for quantity in (N_SIZED | M_SIZED).values():
        assert not quantity(curvature, z).requires_grad
    assert w.grad_fn is g.grad_fn is z.grad_fn is None
    assert w.requires_grad


def test_autocast_does_not_lower_the_precision() -> None:
    w, g, z = replicas(torch.float32)
    for quantity in (N_SIZED | M_SIZED).values():
        expected = quantity(SecantCurvature(w, g, damping=0.5), z)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantity(SecantCurvature(w, g, damping=0.5), z), expected)


def test_strided_views_are_accepted() -> None:
    w, g, z = replicas()
    spaced = torch.zeros(6, 8, dtype=F64)
    spaced[:, ::2] = w.T
    result = SecantCurvature(spaced[:, ::2].T, g).inverse_hvp(torch.stack((z, z), dim=1).T[0])
    torch.testing.assert_close(result, SecantCurvature(w, g).inverse_hvp(z), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_the_papers_rate_scales_with_the_spread_and_the_learning_rate_does_not(scale: float) -> None:
    H, _, _ = quadratic(SPECTRUM, 7, seed=0)
    W = displacements(7, 6, seed=1)
    unit, scaled = SecantCurvature(W, W @ H), SecantCurvature(scale * W, scale * W @ H)
    sharpness = float(torch.linalg.eigvalsh(H).abs().max())
    assert scaled.learning_rate == pytest.approx(1.0 / sharpness)
    assert scaled.paper_learning_rate == pytest.approx(unit.paper_learning_rate / scale)
    assert scaled.paper_learning_rate == pytest.approx(1.0 / float(scaled.singular_values[0]))
    # σ_max(HW) ≤ |λ|_max σ_max(W), and σ_max(W) = 1 here: at unit spread the paper's rate is too large
    assert unit.paper_learning_rate > 1.05 * unit.learning_rate


def test_the_learning_rate_counts_negative_curvature_by_its_magnitude() -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert SecantCurvature(w, w * torch.tensor([-8.0, 2.0])).learning_rate == pytest.approx(1.0 / 8.0)


def test_no_ritz_curvature_with_a_response_gives_an_infinite_rate_and_a_residual() -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # H = [[0, 1], [1, 0]]: xᵀHx = 0 along x, but H x is not
    curvature = SecantCurvature(w, w.flip(1))
    assert curvature.rank == 1
    assert curvature.eigenvalues.tolist() == [0.0]
    assert curvature.residuals.tolist() == [1.0]
    assert curvature.learning_rate == math.inf
    assert curvature.paper_learning_rate == pytest.approx(math.sqrt(2.0))
