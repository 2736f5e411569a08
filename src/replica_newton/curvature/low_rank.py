"""Products with a Hessian of which some eigenpairs are known, and with its damped inverse."""

from collections.abc import Callable

import torch
from torch import Tensor


def low_rank_hvp(eigenvalues: Tensor, eigenvectors: Tensor, z: Tensor, *, bulk: float = 0.0) -> Tensor:
    """Hessian-vector product from known eigenpairs, with one curvature for all other directions.

        H z ≈ bulk · z_⊥ + Σ_i θ_i (x_iᵀ z) x_i,      z_⊥ = z − Σ_i (x_iᵀ z) x_i

    Args:
        eigenvalues: `(order,)`, signed θ.
        eigenvectors: `(order, N)`, orthonormal rows x_i.
        z: `(N,)` or `(k, N)` vectors.
        bulk: curvature outside the span of the eigenvectors, in units of the Hessian.

    Returns:
        The product, of the shape of `z`, in the dtype of `eigenvectors`.

    Raises:
        ValueError: if `bulk` is not finite or the shapes do not fit.
    """
    if not -float("inf") < bulk < float("inf"):
        raise ValueError(f"{bulk=} must be finite")
    z = check_pairs(eigenvalues, eigenvectors, z)
    return spectral_product(eigenvectors, eigenvalues.to(eigenvectors), bulk, z)


def damped_inverse_hvp(
    eigenvalues: Tensor,
    eigenvectors: Tensor,
    z: Tensor,
    damping: float,
    *,
    bulk: float = 0.0,
    absolute: bool = False,
) -> Tensor:
    """Product of z with the inverse of the damped Hessian: the exact inverse of `low_rank_hvp` plus the damping.

        (H + λI)⁻¹ z ≈ z_⊥ / (bulk + λ) + Σ_i (x_iᵀ z) x_i / (θ_i + λ)

    The inverse exists where no `θ_i + λ` vanishes, but is a step down or an influence only where all are positive:
    along a negative curvature that λ does not outweigh, the product points the wrong way. Such pairs are an error;
    `absolute=True` takes |θ_i| in place of θ_i, as `saddle_free_inverse_hvp` does.

    Args:
        eigenvalues: `(order,)`, signed θ.
        eigenvectors: `(order, N)`, orthonormal rows x_i.
        z: `(N,)` or `(k, N)` vectors.
        damping: λ, in units of the Hessian.
        bulk: curvature outside the span of the eigenvectors, in units of the Hessian.
        absolute: whether to take magnitudes of the θ_i.

    Returns:
        The product, of the shape of `z`, in the dtype of `eigenvectors`.

    Raises:
        ValueError: if `bulk + damping` is not positive and finite, if a `θ_i + damping` is not positive, or if the
            shapes do not fit.

    Source:
        Koh and Liang (2017), arXiv 1703.04730, for the damped inverse in influence functions.
    """
    if not 0.0 < bulk + damping < float("inf"):
        raise ValueError(f"bulk + damping must be positive and finite, got {bulk} + {damping}")
    z = check_pairs(eigenvalues, eigenvectors, z)
    curvatures = (eigenvalues.abs() if absolute else eigenvalues) + damping
    if curvatures.numel() and not float(curvatures.min()) > 0.0:
        raise ValueError(
            f"every eigenvalue + {damping=} must be > 0, got the eigenvalue {float(eigenvalues.min()):.4g}; "
            "raise the damping, or pass absolute=True"
        )
    return spectral_product(eigenvectors, curvatures.reciprocal().to(eigenvectors), 1.0 / (bulk + damping), z)


def check_pairs(eigenvalues: Tensor, eigenvectors: Tensor, z: Tensor) -> Tensor:
    """Check that eigenpairs and vectors fit together.

    Args:
        eigenvalues: `(order,)`.
        eigenvectors: `(order, N)`.
        z: `(N,)` or `(k, N)`.

    Returns:
        z in the dtype of the eigenvectors.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if eigenvectors.dim() != 2 or eigenvalues.shape != eigenvectors.shape[:1] or z.shape[-1:] != eigenvectors.shape[1:]:
        raise ValueError(
            "eigenvalues must be (order,), eigenvectors (order, N) and z (N,) or (k, N); got "
            f"{tuple(eigenvalues.shape)}, {tuple(eigenvectors.shape)} and {tuple(z.shape)}"
        )
    return z.to(eigenvectors.dtype)


def spectral_product(
    eigenvectors: Tensor,
    factors: Tensor,
    bulk: float,
    z: Tensor,
    *,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Product of z with the matrix that has known eigenvectors, and one eigenvalue for all other directions.

        bulk · z_⊥ + Σ_i factors_i (x_iᵀ z) x_i

    Args:
        eigenvectors: `(order, N)`, orthonormal rows x_i.
        factors: `(order,)`, in dtype and on the device of the eigenvectors.
        bulk: eigenvalue outside their span.
        z: `(N,)` or `(k, N)`, likewise.
        total: sums over processes that hold different columns of z and the eigenvectors; see `SecantCurvature`.

    Returns:
        The product, of the shape of `z`.
    """
    with torch.autocast(z.device.type, enabled=False):
        along: Tensor = z @ eigenvectors.T
        if total is not None:
            along = total(along.double().cpu()).to(along)
        change: Tensor = along * (factors - bulk)
        return torch.add(change @ eigenvectors, z, alpha=bulk)
