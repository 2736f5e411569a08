"""Rayleigh–Ritz: signed Hessian eigenpairs from displaced replicas, free of the scale of the displacements."""

from dataclasses import dataclass

import torch
from torch import Tensor

from replica_newton.curvature.gram import differences_basis, unresolved


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs of the Hessian in the span of the replicas' displacements.

    The eigenvectors are kept as coefficients: `x_i = Σ_m coefficients[m, i] W_m`, unit length.

    Attributes:
        values: `(order,)` fp64, Ritz values θ in units of the Hessian, signed, by |θ| descending.
        coefficients: `(M, order)` fp64, every column sums to zero, its entry of largest magnitude is positive.
        residuals: `(order,)` fp64, `‖H x_i − θ_i x_i‖`: some eigenvalue of H lies within this distance of θ_i.
    """

    values: Tensor
    coefficients: Tensor
    residuals: Tensor


def rayleigh_ritz(WW: Tensor, WG: Tensor, GG: Tensor, *, rtol: float) -> RitzPairs:
    """Rayleigh–Ritz pairs of the pencil `(sym(WᵀG), WᵀW)`, from the Gram matrices alone.

    With `G = H W`, an orthonormal basis `Q = W S` of the displacements gives `QᵀHQ = Sᵀ sym(WᵀG) S`. Its
    eigenvalues are those of H restricted to the displacements: signed, and unchanged if the replicas move apart
    by another factor, as the singular values of G are not.

    Args:
        WW: `(M, M)` fp64 Gram matrix of the centred displacements, entries `W_mᵀ W_n`.
        WG: `(M, M)` fp64 cross products of displacements and centred gradients, entries `W_mᵀ G_n`.
        GG: `(M, M)` fp64 Gram matrix of the centred gradients.
        rtol: displacement directions shorter than `rtol` times the longest are dropped, as are those too short for
            an fp64 Gram matrix to resolve (1e-7 of the longest).

    Returns:
        At most M−1 pairs; none when the replicas stand at one point.

    Source:
        Parlett, The Symmetric Eigenvalue Problem (1998), ch. 11; the paper's eigenvalues (section 2) are singular
        values of G, a different quantity.
    """
    basis = differences_basis(WW.shape[0])
    lengths, directions = torch.linalg.eigh(basis.T @ WW @ basis)
    first = unresolved(lengths, rtol=rtol, scale=max(WW.diagonal().tolist()))
    span = basis @ (directions[:, first:] / lengths[first:].sqrt())

    projected = span.T @ WG @ span
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    order = values.abs().argsort(descending=True, stable=True)
    values, coefficients = values[order], span @ rotation[:, order]
    if values.numel():
        largest = coefficients.gather(0, coefficients.abs().argmax(dim=0, keepdim=True))
        coefficients = coefficients * largest.sign()

    squared_responses = ((GG @ coefficients) * coefficients).sum(dim=0)
    residuals = (squared_responses - values**2).clamp(min=0).sqrt()
    return RitzPairs(values, coefficients, residuals)
