"""Top eigenpairs of a network's Hessian, sweep by sweep, and what a reader needs to judge them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from replica_newton.spectrum.krylov import KrylovSubspace
from replica_newton.spectrum.products import HessianProducts


@dataclass(frozen=True)
class Sweep:
    """Where the iteration stood after one sweep.

    Attributes:
        sweep: its number, from 1.
        gradients: gradients over the whole data set so far.
        eigenvalues: of the pairs so far, at most `top`, signed, by magnitude descending.
        residual: largest relative residual of these pairs; see `KrylovSubspace.relative_residuals`.
        converged: how many of them are within the tolerance.
    """

    sweep: int
    gradients: int
    eigenvalues: tuple[float, ...]
    residual: float
    converged: int

    @property
    def sharpness(self) -> float:
        """Largest eigenvalue so far."""
        return max(self.eigenvalues)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenpairs of largest magnitude of a Hessian, and how they were reached.

    Attributes:
        eigenvalues: `(top,)` fp64 on the CPU, signed, by magnitude descending.
        eigenvectors: `(top, N)`, orthonormal rows, parameters flattened in the order of `model.parameters()`.
        residuals: `(top,)` fp64 on the CPU, `‖H x − θ x‖`: some eigenvalue of H lies within this distance of θ.
        tolerance: `‖H x − θ x‖/|θ|` that was asked for.
        sweeps: one entry a sweep.
        converged: whether every pair is within the tolerance.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    tolerance: float
    sweeps: tuple[Sweep, ...]
    converged: bool


def hessian_spectrum(
    products: HessianProducts,
    top: int,
    *,
    replicas: int = 8,
    tolerance: float = 1e-2,
    sweeps: int = 50,
    seed: int = 0,
    advance: Callable[[float], None] | None = None,
    report: Callable[[Sweep], None] | None = None,
) -> Spectrum:
    """Top eigenpairs of a Hessian, probed by M replicas at a time.

    In a sweep every replica probes one direction on the same data; a `KrylovSubspace` joins the responses and says
    where to probe next.

    Args:
        products: of the Hessian with blocks of vectors.
        top: eigenpairs wanted, in 1 … N.
        replicas: M, directions in a sweep, in 1 … N.
        tolerance: relative residual `‖H x − θ x‖/|θ|` at which a pair has converged; the error of θ is then below this
            share of it, and mostly far below: it falls with the square of the residual.
        sweeps: at most so many, >= 1.
        seed: of the random first directions.
        advance: is told the share of a sweep that each batch was.
        report: is told of every sweep.

    Returns:
        The pairs, converged or not; fewer than `top` if the sweeps did not suffice for as many directions.

    Raises:
        ValueError: if an argument is out of range.
        FloatingPointError: if a product is not finite.
    """
    if sweeps < 1:
        raise ValueError(f"{sweeps=} must be >= 1")
    space = KrylovSubspace(top, products.size, block=replicas, tolerance=tolerance, seed=seed, device=products.device)
    done: list[Sweep] = []
    while len(done) < sweeps and not (done and space.converged):
        responses = products(space.directions(), advance)
        if not bool(torch.isfinite(responses).all()):
            raise FloatingPointError("a product with the Hessian is not finite: there is no curvature to see")
        space.observe(responses)
        relative = space.relative_residuals
        done.append(
            Sweep(
                sweep=space.sweeps,
                gradients=products.gradients,
                eigenvalues=tuple(space.eigenvalues.tolist()),
                residual=float(relative.max()),
                converged=int((relative <= tolerance).sum()),
            )
        )
        if report is not None:
            report(done[-1])
    return Spectrum(
        eigenvalues=space.eigenvalues,
        eigenvectors=space.eigenvectors,
        residuals=space.residuals,
        tolerance=tolerance,
        sweeps=tuple(done),
        converged=space.converged,
    )
