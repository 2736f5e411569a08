"""The Krylov space on matrices whose eigenpairs are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import F64, normal, symmetric

from replica_newton import TrackedSubspace
from replica_newton.spectrum import KrylovSubspace

TOP = torch.tensor([10.0, -8.0, 6.0, 5.0, -4.0, 3.0, 2.5, 2.2], dtype=F64)
SPECTRUM = torch.cat((TOP, torch.linspace(1.9, -1.9, 192, dtype=F64)))
N, ORDER = len(SPECTRUM), len(TOP)


def iterate(space: KrylovSubspace, H: torch.Tensor, limit: int = 1000) -> int:
    """Products used until the space says that it has converged."""
    products = 0
    while not space.converged and products < limit:
        q = space.directions()
        products += len(q)
        space.observe(q @ H)
    return products


@pytest.mark.parametrize("block", [1, 3, 8, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_are_those_of_a_dense_decomposition(block: int, seed: int):
    H = symmetric(SPECTRUM, seed=seed)
    space = KrylovSubspace(ORDER, N, block=block, tolerance=1e-6, seed=seed)
    iterate(space, H)
    assert space.converged
    torch.testing.assert_close(space.eigenvalues, TOP, rtol=1e-10, atol=0.0)
    X = space.eigenvectors
    torch.testing.assert_close(X @ X.T, torch.eye(ORDER, dtype=F64), rtol=0.0, atol=1e-12)
    direct = (X @ H - TOP[:, None] * X).norm(dim=1)
    torch.testing.assert_close(space.residuals, direct, rtol=1e-3, atol=1e-9)
    assert float((direct / TOP.abs()).max()) <= 1e-6


def test_restarts_lose_nothing_that_is_wanted():
    H = symmetric(torch.cat((TOP, torch.linspace(2.1, -2.1, 192, dtype=F64))), seed=0)
    space = KrylovSubspace(ORDER, N, block=1, tolerance=1e-8)
    products = iterate(space, H)
    assert products > 2 * space._capacity
    assert len(space._basis) <= space._capacity
    torch.testing.assert_close(space.eigenvalues, TOP, rtol=1e-10, atol=0.0)


def test_it_needs_a_fraction_of_the_products_of_block_power_iteration():
    H = symmetric(SPECTRUM, seed=0)
    krylov = iterate(KrylovSubspace(ORDER, N, block=ORDER, tolerance=1e-3), H)
    power, space = 0, TrackedSubspace(ORDER, N, smoothing=1.0)
    while power < 4000 and not (space.sweeps and bool((space.residuals <= 1e-3 * space.eigenvalues.abs()).all())):
        space.observe(space.directions(ORDER).to(F64) @ H)
        power += ORDER
    assert krylov < power / 3


@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0, 1e-3, 5.0]), min_size=1, max_size=12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_any_spectrum_multiple_or_zero_is_found(spectrum: list[float], order: int, block: int, seed: int):
    size = len(spectrum)
    order, block = min(order, size), min(block, size)
    space = KrylovSubspace(order, size, block=block, tolerance=1e-9, seed=seed)
    H = symmetric(spectrum, seed=7)
    iterate(space, H, 20 * size)
    X = space.eigenvectors
    torch.testing.assert_close(X @ X.T, torch.eye(order, dtype=F64), rtol=0.0, atol=1e-9)
    torch.testing.assert_close(X @ H, space.eigenvalues[:, None] * X, rtol=0.0, atol=1e-6)
    # Of a multiple eigenvalue a Krylov space may see one copy before another of smaller magnitude, as any such method.
    largest = max(abs(value) for value in spectrum)
    assert float(space.eigenvalues[0].abs()) == pytest.approx(largest, rel=1e-6, abs=1e-9)


def test_the_last_sweeps_probe_only_what_is_open():
    space = KrylovSubspace(ORDER, N, block=ORDER, tolerance=1e-3)
    H, counts = symmetric(SPECTRUM, seed=0), []
    while not space.converged:
        counts.append(len(space.directions()))
        space.observe(space.directions() @ H)
    assert counts[:3] == [ORDER] * 3
    assert 1 <= counts[-1] < ORDER
    assert len(space.directions()) == 0


def test_the_first_block_depends_on_the_seed_alone():
    first = KrylovSubspace(2, 30, block=3, seed=5).directions()
    assert torch.equal(first, KrylovSubspace(4, 30, block=3, seed=5).directions())
    assert not torch.equal(first, KrylovSubspace(2, 30, block=3, seed=6).directions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, r"order=0 must be in \[1, 5\]"),
        ({"order": 6}, r"order=6 must be in \[1, 5\]"),
        ({"block": 0}, r"block=0 must be in \[1, 5\]"),
        ({"block": 6}, r"block=6 must be in \[1, 5\]"),
        ({"tolerance": 0.0}, "tolerance=0.0 must be positive and finite"),
        ({"tolerance": float("nan")}, "tolerance=nan must be positive and finite"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        KrylovSubspace(**({"order": 2, "size": 5, "block": 2} | options))


def test_bad_responses_are_refused_and_change_nothing():
    space = KrylovSubspace(2, 6, block=2)
    before = space.directions().clone()
    with pytest.raises(ValueError, match=r"responses must be \(2, 6\), got \(1, 6\)"):
        space.observe(normal(1, 6, seed=0))
    with pytest.raises(ValueError, match="responses must be finite"):
        space.observe(torch.full((2, 6), float("nan"), dtype=F64))
    assert torch.equal(space.directions(), before)
    assert space.sweeps == 0
