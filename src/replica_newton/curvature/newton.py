"""Newton steps: saddle-free from eigenpairs, and exact for Hessians small enough to write down."""

from collections.abc import Callable

import torch
from torch import Tensor

from replica_newton.curvature.low_rank import check_pairs, spectral_product


def saddle_free_inverse_hvp(
    eigenvalues: Tensor,
    eigenvectors: Tensor,
    z: Tensor,
    *,
    damping: float = 0.0,
    bulk_rate: float = 1.0,
    rtol: float = 1e-6,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Product of z with `|H|⁻¹` on known eigenpairs, and with a multiple of the identity across them.

        bulk_rate · z_⊥ + Σ_i (x_iᵀ z) x_i / (|θ_i| + damping)

    Unlike `H⁻¹`, `|H|⁻¹` is positive: along negative curvature the step goes down, away from a saddle.

    Args:
        eigenvalues: `(order,)`, signed θ.
        eigenvectors: `(order, N)`, orthonormal rows x_i.
        z: `(N,)` or `(k, N)` vectors.
        damping: added to every |θ_i|, in units of the Hessian.
        bulk_rate: factor outside the span of the eigenvectors; 1 as in the paper.
        rtol: pairs with `|θ_i| + damping ≤ rtol · (max|θ| + damping)` count as part of the bulk: there is no
            curvature to divide by.
        total: sums over processes that hold different columns of z and the eigenvectors; see `SecantCurvature`.

    Returns:
        The product, of the shape of `z`, in the dtype of `eigenvectors`.

    Raises:
        ValueError: if `damping` or `bulk_rate` is negative or not finite, if `rtol` is not in [0, 1), or if the shapes
            do not fit.

    Source:
        Dauphin et al. (2014), arXiv 1406.2572.
    """
    if not 0.0 <= damping < float("inf"):
        raise ValueError(f"{damping=} must be finite and >= 0")
    if not 0.0 <= bulk_rate < float("inf"):
        raise ValueError(f"{bulk_rate=} must be finite and >= 0")
    if not 0.0 <= rtol < 1.0:
        raise ValueError(f"{rtol=} must be in [0, 1)")
    z = check_pairs(eigenvalues, eigenvectors, z)
    curvatures: Tensor = (eigenvalues.abs() + damping).to(eigenvectors)
    curved = ~(curvatures <= rtol * curvatures.max()) if curvatures.numel() else curvatures > 0
    return spectral_product(eigenvectors[curved], curvatures[curved].reciprocal(), bulk_rate, z, total=total)


def exact_newton_step(hessian: Tensor, gradient: Tensor) -> Tensor:
    """Exact Newton step `H⁻¹ g` by a dense solve: the reference for small N.

    Args:
        hessian: `(N, N)` symmetric H.
        gradient: `(N,)` g.

    Returns:
        `(N,)` step d; the update is `w ← w − α d`.

    Raises:
        ValueError: if the shapes do not fit, or the Hessian is not finite or is singular to working precision: its
            smallest pivot is at most N·ε times the largest.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, equation 1.
    """
    if gradient.dim() != 1 or gradient.numel() == 0 or hessian.shape != (gradient.numel(), gradient.numel()):
        raise ValueError(
            f"hessian must be (N, N) and gradient (N,), N >= 1; got {tuple(hessian.shape)} and {tuple(gradient.shape)}"
        )
    lu = torch.linalg.lu_factor_ex(hessian)
    pivots = lu.LU.detach().diagonal().abs()
    smallest, largest = float(pivots.min()), float(pivots.max())
    if not smallest > gradient.numel() * torch.finfo(hessian.dtype).eps * largest:
        raise ValueError(
            "hessian must be finite and non-singular, or an exact Newton step does not exist; its pivots have "
            f"magnitudes from {smallest:.3g} to {largest:.3g}"
        )
    step: Tensor = torch.linalg.lu_solve(lu.LU, lu.pivots, gradient.unsqueeze(-1)).squeeze(-1)
    return step
