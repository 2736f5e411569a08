"""Optimizers: one spread, one topology and the curvature algebra, assembled into a `torch.optim` optimizer."""

from replica_newton.optim.paired_probes import PairedProbes
from replica_newton.optim.replica_newton import ReplicaNewton

__all__ = ["PairedProbes", "ReplicaNewton"]
