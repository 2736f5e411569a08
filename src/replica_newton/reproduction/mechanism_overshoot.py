"""How far the secant step goes on a quadratic, by the directions in which the replicas stand apart."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replica_newton.curvature import SecantCurvature
from replica_newton.reproduction.mechanism_lines import median_and_range

KINDS = ("random", "local", "power")
"""Displacements: isotropic; local steps with noise of covariance ∝ H; responses of a block power iteration."""

ERRORS = ("isotropic", "sharp")
"""Distance e to the minimum: the same along every eigenvector; or proportional to the eigenvalue (`e_i ∝ λ_i`)."""

POWER_SWEEPS = 3


class Overshoot(NamedTuple):
    """What the curvature part `p = Σ_i (u_iᵀ g) W v_i / σ_i` of the step does on `½ eᵀHe`, with `g = H e`.

    Attributes:
        length: `‖p‖ / ‖H⁻¹g‖ = ‖p‖ / ‖e‖`, against the Newton step; 1 at most if p were a projection of it.
        captured_length: `‖p‖` against the Newton step projected on the M−1 sharpest directions.
        value: value of the quadratic at `e − p` over that at `e`: above 1 the step climbs.
    """

    length: float
    captured_length: float
    value: float


def overshoot(spectrum: Tensor, error: Tensor, W: Tensor) -> Overshoot:
    """Curvature part of the secant step against the Newton step, on the quadratic `½ eᵀHe` with `H = diag(λ)`.

    Args:
        spectrum: `(N,)` eigenvalues λ > 0, descending; H is diagonal without loss of generality.
        error: `(N,)`, the distance e to the minimum.
        W: `(M, N)` displacements; the secants `G = H W` are exact.

    Returns:
        Its length and what it does to the value.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, section 2, for the step.
    """
    gradient = spectrum * error
    curvature = SecantCurvature(W, W * spectrum)
    U = curvature.left_singular_vectors
    across = gradient - U.T @ (U @ gradient)
    part = curvature.inverse_hvp(gradient) - across
    after = error - part
    return Overshoot(
        length=float(part.norm() / error.norm()),
        captured_length=float(part.norm() / error[: len(W) - 1].norm()),
        value=float((spectrum * after**2).sum() / (spectrum * error**2).sum()),
    )


def displacements(kind: str, spectrum: Tensor, replicas: int, generator: torch.Generator) -> Tensor:
    """Displacements of M replicas on the quadratic with `H = diag(λ)`.

    Args:
        kind: one of `KINDS`. "random": `d_m ~ N(0, I)`. "local": `d_m = −(g_m − ḡ)` with gradient noise of covariance
            H, as that of a well-specified likelihood is at its minimum. "power": the orthonormal basis of the last
            responses, `Q ← orth(H Q)`, three times from random directions.
        spectrum: `(N,)` eigenvalues.
        replicas: M.
        generator: random state.

    Returns:
        `(M, N)`; their scale is arbitrary, as the step does not depend on it.
    """
    rows = torch.randn(replicas, len(spectrum), generator=generator, dtype=spectrum.dtype)
    if kind == "local":
        return -(rows - rows.mean(dim=0)) * spectrum.sqrt()
    if kind == "power":
        for _ in range(POWER_SWEEPS):
            rows = torch.linalg.qr((rows * spectrum).T).Q.T
    return rows


def measure_overshoot(
    *,
    sizes: Sequence[int],
    exponents: Sequence[float],
    replicas: Sequence[int],
    seeds: int,
    tell: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """`overshoot` on power-law spectra `λ_i = i^(−p)` over all settings.

    Args:
        sizes: numbers N of parameters.
        exponents: p.
        replicas: M.
        seeds: how many errors and displacements for every setting.
        tell: is told the share of the settings done.

    Returns:
        Median, smallest and largest value over the seeds for every kind of displacement, error, N, p and M.
    """
    settings = [(N, p, error, kind) for N in sizes for p in exponents for error in ERRORS for kind in KINDS]
    groups = []
    for done, (N, p, error, kind) in enumerate(settings):
        tell(done / len(settings))
        spectrum = torch.arange(1, N + 1, dtype=torch.float64) ** -p
        scale = spectrum if error == "sharp" else torch.ones_like(spectrum)
        seen = []
        for M in replicas:
            # The same errors for every kind, M and exponent: differences between them are not differences in luck.
            generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
            seen.append(
                [
                    overshoot(
                        spectrum,
                        scale * torch.randn(N, generator=generator, dtype=torch.float64),
                        displacements(kind, spectrum, M, generator),
                    )
                    for generator in generators
                ]
            )
        group: dict[str, Any] = {"size": N, "exponent": p, "error": error, "displacements": kind}
        for name in Overshoot._fields:
            values = [[getattr(one, name) for one in of_M] for of_M in seen]
            group[name] = median_and_range(values)
        groups.append(group)
    return {"replicas": list(replicas), "seeds": seeds, "groups": groups}
