"""What the search for eigenpairs reports, and when it stops."""

import pytest
import torch
from products import MatrixProducts
from reference import F64, symmetric

from replica_newton.spectrum import Sweep, hessian_spectrum

SPECTRUM = [9.0, -7.0, 5.0, 3.0, *torch.linspace(1.0, -1.0, 36).tolist()]


def test_sweeps_are_told_as_they_come_and_end_when_all_pairs_have_converged():
    products, told, shares = MatrixProducts(symmetric(SPECTRUM, seed=0)), [], []
    found = hessian_spectrum(products, 4, replicas=3, advance=shares.append, report=told.append)
    assert found.converged
    assert tuple(told) == found.sweeps
    assert len(shares) == len(told)
    assert [one.sweep for one in told] == list(range(1, len(told) + 1))
    assert told[-1].gradients == products.gradients
    assert told[0].gradients == 3
    assert len(told[0].eigenvalues) == 3
    assert [one.converged == 4 for one in told] == [False] * (len(told) - 1) + [True]
    assert told[-1].residual <= 1e-2 < told[-2].residual
    assert told[-1].sharpness == pytest.approx(9.0, rel=1e-3)
    torch.testing.assert_close(found.eigenvalues, torch.tensor(SPECTRUM[:4], dtype=F64), rtol=1e-3, atol=0.0)


def test_the_sharpness_is_the_largest_eigenvalue_not_the_largest_magnitude():
    assert Sweep(1, 4, (-7.0, 3.0), 0.1, 0).sharpness == 3.0


def test_sweeps_end_at_their_limit():
    products = MatrixProducts(symmetric(SPECTRUM, seed=0))
    found = hessian_spectrum(products, 4, replicas=2, sweeps=2)
    assert (found.converged, len(found.sweeps), products.gradients) == (False, 2, 4)
    assert found.eigenvectors.shape == (4, 40)


def test_a_product_that_is_not_finite_is_an_error():
    products = MatrixProducts(torch.full((5, 5), float("nan"), dtype=F64))
    with pytest.raises(FloatingPointError, match="a product with the Hessian is not finite"):
        hessian_spectrum(products, 2, replicas=2)


def test_an_option_out_of_range_is_refused_before_any_product():
    products = MatrixProducts(symmetric(SPECTRUM, seed=0))
    for options, message in (({"sweeps": 0}, "sweeps=0 must be >= 1"), ({"replicas": 41}, r"block=41 must be in")):
        with pytest.raises(ValueError, match=message):
            hessian_spectrum(products, 4, **options)
    assert products.gradients == 0
