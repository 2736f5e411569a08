"""Curvature from replicas: pure functions on displacements and gradients, knowing nothing of processes or models."""

from replica_newton.curvature.low_rank import damped_inverse_hvp, low_rank_hvp
from replica_newton.curvature.newton import exact_newton_step, saddle_free_inverse_hvp
from replica_newton.curvature.ritz import RitzPairs, rayleigh_ritz
from replica_newton.curvature.secant import SecantCurvature

__all__ = [
    "RitzPairs",
    "SecantCurvature",
    "damped_inverse_hvp",
    "exact_newton_step",
    "low_rank_hvp",
    "rayleigh_ritz",
    "saddle_free_inverse_hvp",
]
