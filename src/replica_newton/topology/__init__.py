"""Topologies: where the replicas live and how their vectors travel."""

from replica_newton.topology.simulated import ReplicaClosure, ReplicaGradients, Simulated
from replica_newton.topology.topology import Topology
from replica_newton.topology.tree_reduction import LocalClosure, TopologyError, TreeReduction

__all__ = [
    "LocalClosure",
    "ReplicaClosure",
    "ReplicaGradients",
    "Simulated",
    "Topology",
    "TopologyError",
    "TreeReduction",
]
