"""Second-order training for PyTorch from the differences between data-parallel replicas."""

from replica_newton.checkpoints import load_checkpoint, save_checkpoint
from replica_newton.curvature import SecantCurvature, exact_newton_step, saddle_free_inverse_hvp
from replica_newton.graceful_exit import GracefulExit
from replica_newton.launch import init_processes
from replica_newton.monitor import CurvatureMonitor, CurvatureObservation, SharpnessCeiling
from replica_newton.optim import PairedProbes, ReplicaNewton
from replica_newton.spread import LocalStep, RandomDirections, TrackedSubspace
from replica_newton.topology import ParameterServer, Simulated, TreeReduction

__all__ = [
    "CurvatureMonitor",
    "CurvatureObservation",
    "GracefulExit",
    "LocalStep",
    "PairedProbes",
    "ParameterServer",
    "RandomDirections",
    "ReplicaNewton",
    "SecantCurvature",
    "SharpnessCeiling",
    "Simulated",
    "TrackedSubspace",
    "TreeReduction",
    "exact_newton_step",
    "init_processes",
    "load_checkpoint",
    "saddle_free_inverse_hvp",
    "save_checkpoint",
]
__version__ = "0.1.0"
