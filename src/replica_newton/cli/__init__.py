"""The command `replica-newton`."""

from replica_newton.cli.entry import main
from replica_newton.cli.root import app

__all__ = ["app", "main"]
