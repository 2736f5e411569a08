"""The spectrum of a network that stands still: top Hessian eigenpairs and density over a whole data set."""

from replica_newton.spectrum.eigenpairs import Spectrum, Sweep, hessian_spectrum
from replica_newton.spectrum.krylov import KrylovSubspace
from replica_newton.spectrum.products import ExactProducts, HessianProducts, ProbedProducts

__all__ = [
    "ExactProducts",
    "HessianProducts",
    "KrylovSubspace",
    "ProbedProducts",
    "Spectrum",
    "Sweep",
    "hessian_spectrum",
]
