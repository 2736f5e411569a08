"""The density of a Hessian's whole spectrum, by stochastic Lanczos quadrature."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from replica_newton.spectrum.products import HessianProducts

MISSING_LIBRARY = "the density of a spectrum needs hessian-eigenthings: pip install 'replica-newton[spectrum]'"

PROBES, STEPS = 4, 64


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Density of eigenvalues, `φ(t) ≈ 1/N Σ_i g(t − λ_i)` with a Gaussian g of width sigma.

    Attributes:
        grid: `(points,)` values of t, equally spaced over the spectrum.
        density: `(points,)`, its integral is 1.
        sigma: width of the Gaussian, in units of the Hessian.
        nodes: `(probes, steps)` Ritz values of every probe; nan where a probe ended early.
        weights: `(probes, steps)` their quadrature weights, which sum to 1 for every probe.
    """

    grid: Tensor
    density: Tensor
    sigma: float
    nodes: Tensor
    weights: Tensor


def spectral_density(
    products: HessianProducts,
    *,
    probes: int = PROBES,
    steps: int = STEPS,
    points: int = 2000,
    sigma: float | None = None,
    seed: int = 0,
    advance: Callable[[float], None] | None = None,
) -> SpectralDensity:
    """Density of the eigenvalues from random vectors, `probes · steps` products.

    Args:
        products: of the Hessian.
        probes: random vectors; the noise of the density falls with their root.
        steps: Lanczos steps for each, at most N are taken.
        points: of the grid.
        sigma: width of the Gaussian; by default the range of the spectrum over `steps`.
        seed: of the random vectors.
        advance: is told the share of a product that each batch was.

    Returns:
        The density, all tensors fp64 on the CPU.

    Raises:
        ImportError: if the package hessian-eigenthings is not installed.
        ValueError: if `probes`, `steps` or `points` is below 1 or `sigma` not positive.

    Source:
        Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature; Ghorbani, Krishnan
        and Xiao (2019), arXiv 1901.10159, for networks.
    """
    for name, number in (("probes", probes), ("steps", steps), ("points", points)):
        if number < 1:
            raise ValueError(f"{name} must be >= 1, got {number}")
    if sigma is not None and not 0.0 < sigma < float("inf"):
        raise ValueError(f"{sigma=} must be positive and finite")
    try:
        import hessian_eigenthings
    except ImportError as error:
        raise ImportError(MISSING_LIBRARY) from error
    operator = hessian_eigenthings.LambdaOperator(
        lambda vector: products(vector[None], advance)[0],
        products.size,
        device=products.device,
        dtype=torch.float64,
    )
    found = hessian_eigenthings.spectral_density(
        operator,
        num_runs=probes,
        lanczos_steps=min(steps, products.size),
        num_grid_points=points,
        sigma=sigma,
        seed=seed,
    )
    return SpectralDensity(
        grid=found.grid.cpu(),
        density=found.density.cpu(),
        sigma=found.sigma,
        nodes=found.raw_eigenvalues.cpu(),
        weights=found.raw_weights.cpu(),
    )
