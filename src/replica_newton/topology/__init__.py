"""Topologies: where the replicas live and how their vectors travel."""

from replica_newton.topology.layout import Layout
from replica_newton.topology.local_closure import LocalClosure
from replica_newton.topology.parameter_server import ParameterServer
from replica_newton.topology.simulated import ReplicaClosure, ReplicaGradients, Simulated
from replica_newton.topology.topology import Topology
from replica_newton.topology.tree_reduction import TreeReduction
from replica_newton.topology.watch import TopologyError

__all__ = [
    "Layout",
    "LocalClosure",
    "ParameterServer",
    "ReplicaClosure",
    "ReplicaGradients",
    "Simulated",
    "Topology",
    "TopologyError",
    "TreeReduction",
]
