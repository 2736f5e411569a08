"""Second-order training for PyTorch from the differences between data-parallel replicas."""

from replica_newton.curvature import SecantCurvature, exact_newton_step, saddle_free_inverse_hvp
from replica_newton.monitor import CurvatureMonitor, CurvatureObservation, SharpnessCeiling
from replica_newton.optim import ReplicaNewton
from replica_newton.spread import LocalStep, RandomDirections, TrackedSubspace
from replica_newton.topology import ParameterServer, Simulated, TreeReduction

__all__ = [
    "CurvatureMonitor",
    "CurvatureObservation",
    "LocalStep",
    "ParameterServer",
    "RandomDirections",
    "ReplicaNewton",
    "SecantCurvature",
    "SharpnessCeiling",
    "Simulated",
    "TrackedSubspace",
    "TreeReduction",
    "exact_newton_step",
    "saddle_free_inverse_hvp",
]
__version__ = "0.1.0"
