"""Spreads: where the replicas stand apart from the parameters they share."""

from replica_newton.spread.spread import LocalStep, RandomDirections, Spread

__all__ = ["LocalStep", "RandomDirections", "Spread"]
