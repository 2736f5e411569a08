"""Topologies: where the replicas live and how their vectors travel."""

from replica_newton.topology.simulated import ReplicaClosure, ReplicaGradients, Simulated

__all__ = ["ReplicaClosure", "ReplicaGradients", "Simulated"]
