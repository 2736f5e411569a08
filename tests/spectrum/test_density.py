"""The density of eigenvalues against the spectrum of a dense matrix."""

import sys

import pytest
import torch
from products import MatrixProducts
from reference import F64, symmetric

from replica_newton.spectrum.density import spectral_density

pytest.importorskip("hessian_eigenthings")
VALUES = torch.cat((torch.linspace(-1.0, 1.0, 180, dtype=F64), torch.tensor([6.0] * 15 + [9.0] * 5, dtype=F64)))


def test_the_density_is_that_of_the_dense_spectrum():
    H = symmetric(VALUES, seed=0)
    shares: list[float] = []
    found = spectral_density(MatrixProducts(H), probes=30, steps=40, sigma=0.2, advance=shares.append)
    assert found.density.dtype == F64
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(30, dtype=F64), rtol=1e-9, atol=0.0)
    assert sum(shares) == found.nodes.isfinite().sum()
    exact = torch.exp(-(((found.grid[:, None] - VALUES) / 0.2) ** 2) / 2).mean(dim=1) / (0.2 * (2 * torch.pi) ** 0.5)
    # Noise of 30 probes: mass moves, but little of it.
    assert float(torch.trapezoid((found.density - exact).abs(), found.grid)) < 0.1
    for centre, share in ((0.0, 180 / 200), (6.0, 15 / 200), (9.0, 5 / 200)):
        near = (found.nodes - centre).abs() < 1.5
        assert float(found.weights[near].sum() / 30) == pytest.approx(share, abs=0.03)


def test_steps_beyond_the_number_of_parameters_are_not_taken():
    found = spectral_density(MatrixProducts(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=F64))), probes=2)
    assert found.nodes.shape == (2, 3)
    torch.testing.assert_close(found.nodes[0], torch.tensor([1.0, 2.0, 4.0], dtype=F64))


@pytest.mark.parametrize("options", [{"probes": 0}, {"steps": 0}, {"points": 0}, {"sigma": 0.0}])
def test_an_option_out_of_range_is_refused(options: dict):
    with pytest.raises(ValueError, match=f"{next(iter(options))}"):
        spectral_density(MatrixProducts(torch.eye(3, dtype=F64)), **options)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "hessian_eigenthings", None)
    with pytest.raises(ImportError, match=r"pip install 'replica-newton\[spectrum\]'"):
        spectral_density(MatrixProducts(torch.eye(3, dtype=F64)))
