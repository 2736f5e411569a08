"""Spreads: where the replicas stand apart from the parameters they share."""

from replica_newton.spread.spread import LocalStep, RandomDirections, Spread, regrouped
from replica_newton.spread.tracked_subspace import TrackedSubspace

__all__ = ["LocalStep", "RandomDirections", "Spread", "TrackedSubspace", "regrouped"]
