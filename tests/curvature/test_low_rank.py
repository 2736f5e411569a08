"""Products on known eigenpairs against dense matrices, and properties: the one is the inverse of the other."""

import networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import closure_of
from reference import F64, normal, orthogonal, symmetric
from torch import Tensor

from replica_newton import CurvatureMonitor, TrackedSubspace, saddle_free_inverse_hvp
from replica_newton.curvature import damped_inverse_hvp, low_rank_hvp

N = 12


def pairs(*values: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.tensor(values, dtype=F64), orthogonal(N, seed=seed)[: len(values)]


def dense(values: Tensor, vectors: Tensor, bulk: float) -> Tensor:
    P = vectors.T @ vectors
    return vectors.T @ values.diag() @ vectors + bulk * (torch.eye(N, dtype=F64) - P)


@pytest.mark.parametrize("bulk", [0.0, 0.7, -0.2])
@pytest.mark.parametrize("shape", [(N,), (4, N)])
def test_products_are_those_of_the_dense_matrix(bulk: float, shape: tuple[int, ...]):
    values, vectors = pairs(5.0, -2.0, 0.5)
    z, H = normal(*shape, seed=3), dense(values, vectors, bulk)
    torch.testing.assert_close(low_rank_hvp(values, vectors, z, bulk=bulk), z @ H, rtol=0.0, atol=1e-12)
    inverse = torch.linalg.inv(H + 2.5 * torch.eye(N, dtype=F64))
    found = damped_inverse_hvp(values, vectors, z, 2.5, bulk=bulk)
    torch.testing.assert_close(found, z @ inverse, rtol=0.0, atol=1e-12)


def test_all_pairs_of_a_matrix_give_the_matrix_and_its_damped_inverse():
    H = symmetric(torch.linspace(-1.0, 4.0, N, dtype=F64), seed=1)
    values, vectors = torch.linalg.eigh(H)
    z = normal(N, seed=2)
    torch.testing.assert_close(low_rank_hvp(values, vectors.T, z), H @ z, rtol=0.0, atol=1e-12)
    solved = torch.linalg.solve(H + 1.5 * torch.eye(N, dtype=F64), z)
    torch.testing.assert_close(damped_inverse_hvp(values, vectors.T, z, 1.5), solved, rtol=0.0, atol=1e-11)


@given(
    st.lists(st.floats(-3.0, 50.0), max_size=N),
    st.floats(3.01, 100.0),
    st.floats(0.0, 5.0),
    st.integers(0, 5),
)
def test_the_one_is_the_inverse_of_the_other(values: list[float], damping: float, bulk: float, seed: int):
    theta, vectors = torch.tensor(values, dtype=F64), orthogonal(N, seed=seed)[: len(values)]
    z = normal(N, seed=seed + 1)
    product = low_rank_hvp(theta, vectors, z, bulk=bulk) + damping * z
    torch.testing.assert_close(damped_inverse_hvp(theta, vectors, product, damping, bulk=bulk), z, rtol=0.0, atol=1e-7)


@given(st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=N), st.floats(0.1, 10.0), st.integers(0, 5))
def test_with_magnitudes_the_inverse_is_positive_and_that_of_the_saddle_free_step(
    values: list[float], damping: float, seed: int
):
    theta, vectors = torch.tensor(values, dtype=F64), orthogonal(N, seed=seed)[: len(values)]
    z = normal(N, seed=seed + 1)
    found = damped_inverse_hvp(theta, vectors, z, damping, absolute=True)
    assert float(z @ found) > 0.0
    expected = saddle_free_inverse_hvp(theta, vectors, z, damping=damping, bulk_rate=1.0 / damping, rtol=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_a_large_damping_leaves_the_vector_over_the_damping():
    values, vectors = pairs(5.0, -2.0)
    z = normal(N, seed=3)
    torch.testing.assert_close(1e9 * damped_inverse_hvp(values, vectors, z, 1e9), z, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("damping", [2.0, 1.0])
def test_a_negative_curvature_that_the_damping_does_not_outweigh_is_an_error(damping: float):
    values, vectors = pairs(5.0, -2.0)
    with pytest.raises(
        ValueError, match=rf"every eigenvalue \+ damping={damping} must be > 0, got the eigenvalue -2; "
    ):
        damped_inverse_hvp(values, vectors, normal(N, seed=3), damping)
    assert damped_inverse_hvp(values, vectors, normal(N, seed=3), damping, absolute=True).isfinite().all()


@pytest.mark.parametrize(("damping", "bulk"), [(0.0, 0.0), (-1.0, 0.0), (1.0, -1.0), (float("nan"), 0.0)])
def test_a_bulk_without_positive_curvature_is_an_error(damping: float, bulk: float):
    values, vectors = pairs(5.0)
    with pytest.raises(ValueError, match=r"bulk \+ damping must be positive and finite, got"):
        damped_inverse_hvp(values, vectors, normal(N, seed=3), damping, bulk=bulk)


def test_shapes_that_do_not_fit_are_refused():
    values, vectors = pairs(5.0, 1.0)
    with pytest.raises(ValueError, match=r"got \(1,\), \(2, 12\) and \(12,\)"):
        low_rank_hvp(values[:1], vectors, normal(N, seed=0))
    with pytest.raises(ValueError, match=r"got \(2,\), \(2, 12\) and \(5,\)"):
        damped_inverse_hvp(values, vectors, normal(5, seed=0), 1.0)
    with pytest.raises(ValueError, match="bulk=inf must be finite"):
        low_rank_hvp(values, vectors, normal(N, seed=0), bulk=float("inf"))


def test_a_space_without_pairs_yet_knows_its_bulk_alone():
    space, z = TrackedSubspace(2, N), normal(N, seed=0).float()
    assert torch.equal(space.hvp(z, bulk=3.0), 3.0 * z)
    torch.testing.assert_close(space.inverse_hvp(z, 4.0), z / 4.0)


def test_a_tracked_space_that_holds_everything_gives_the_matrix():
    H = symmetric([4.0, 3.0, -1.0, 0.5], seed=0)
    space = TrackedSubspace(4, 4, smoothing=1.0)
    for _ in range(30):
        space.observe(space.directions(4).to(F64) @ H)
    z = normal(3, 4, seed=1)
    torch.testing.assert_close(space.hvp(z).to(F64), z @ H, rtol=0.0, atol=1e-5)
    inverse = torch.linalg.inv(H + 2.0 * torch.eye(4, dtype=F64))
    torch.testing.assert_close(space.inverse_hvp(z, 2.0).to(F64), z @ inverse, rtol=0.0, atol=1e-5)


def test_a_monitor_passes_its_space_on():
    problem = networks.mlp()
    monitor = CurvatureMonitor(problem.module, rank=4, every=1)
    for _ in range(6):
        monitor.observe(closure_of(problem, 4))
    z = normal(21, seed=0)
    assert torch.equal(monitor.hvp(z, bulk=0.5), monitor.subspace.hvp(z, bulk=0.5))
    found = monitor.inverse_hvp(z, 0.3, bulk=0.5, absolute=True)
    assert torch.equal(found, monitor.subspace.inverse_hvp(z, 0.3, bulk=0.5, absolute=True))
    assert not torch.equal(found, monitor.subspace.inverse_hvp(z, 0.3, absolute=True))
