"""Newton steps: saddle-free from eigenpairs, and exact for Hessians small enough to write down."""

import torch
from torch import Tensor


def saddle_free_inverse_hvp(
    eigenvalues: Tensor,
    eigenvectors: Tensor,
    z: Tensor,
    *,
    damping: float = 0.0,
    bulk_rate: float = 1.0,
    rtol: float = 1e-6,
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

    Returns:
        The product, of the shape of `z`, in the dtype of `eigenvectors`.

    Raises:
        ValueError: if `damping` or `bulk_rate` is negative.

    Source:
        Dauphin et al. (2014), arXiv 1406.2572.
    """
    if damping < 0.0:
        raise ValueError(f"{damping=} must be >= 0")
    if bulk_rate < 0.0:
        raise ValueError(f"{bulk_rate=} must be >= 0")
    z = z.to(eigenvectors.dtype)
    curvatures: Tensor = (eigenvalues.abs() + damping).to(eigenvectors)
    curved = curvatures > rtol * curvatures.max() if curvatures.numel() else curvatures > 0
    curvatures, eigenvectors = curvatures[curved], eigenvectors[curved]
    change: Tensor = (z @ eigenvectors.T) * (curvatures.reciprocal() - bulk_rate)
    return torch.add(change @ eigenvectors, z, alpha=bulk_rate)


def exact_newton_step(hessian: Tensor, gradient: Tensor) -> Tensor:
    """Exact Newton step `H⁻¹ g` by a dense solve: the reference for small N.

    Args:
        hessian: `(N, N)` symmetric H.
        gradient: `(N,)` g.

    Returns:
        `(N,)` step d; the update is `w ← w − α d`.

    Raises:
        ValueError: if the shapes do not fit or the Hessian is singular.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, equation 1.
    """
    if gradient.dim() != 1 or hessian.shape != (gradient.numel(), gradient.numel()):
        raise ValueError(
            f"hessian must be (N, N) and gradient (N,); got {tuple(hessian.shape)} and {tuple(gradient.shape)}"
        )
    step, info = torch.linalg.solve_ex(hessian, gradient)
    if int(info) != 0:
        raise ValueError("hessian must be non-singular: an exact Newton step does not exist")
    return step
