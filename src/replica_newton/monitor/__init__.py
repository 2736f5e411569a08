"""Live curvature beside any optimizer: the monitor, what it sees, and what can be done with it."""

from replica_newton.monitor.curvature_monitor import CurvatureMonitor
from replica_newton.monitor.observation import CurvatureObservation
from replica_newton.monitor.scheduler import SharpnessCeiling

__all__ = ["CurvatureMonitor", "CurvatureObservation", "SharpnessCeiling"]
