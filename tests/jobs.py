"""Jobs for the tests of the runner; in a module of their own, because other processes have to import it."""

import os
import signal
from typing import NamedTuple

from replica_newton.runner import Tell


class Square(NamedTuple):
    """A number to be squared."""

    number: int
    tentative: bool = False
    epochs: int = 2

    @property
    def key(self) -> str:
        """The number."""
        return str(self.number)

    @property
    def label(self) -> str:
        """What it is."""
        return f"square of {self.number}"


def square(job: Square, tell: Tell) -> int:
    """The square; 13 is bad luck."""
    tell(1.0)
    if job.number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number**2
