"""Jobs for the tests of the runner; in a module of their own, because other processes have to import it."""

import os
import signal
import time
from typing import NamedTuple

from replica_newton.runner import Runner, Tell


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


def square_for_ever() -> None:
    """Two processes that say so on their standard output when they are at work, and have no end."""
    jobs = [Square(2), Square(3)]
    Runner[Square](lambda: jobs, _endless, lambda *_: None, lambda: lambda _: 1.0, 2).run(_Nobody())


def _endless(job: Square, tell: Tell) -> None:  # noqa: ARG001
    os.write(1, b"at work\n")
    time.sleep(600.0)


class _Nobody:
    def update(self, done: float, total: float, running: list[tuple[str, float, int]]) -> None:
        """Not told."""

    def finish(self, job: Square, outcome: object) -> None:
        """Not told."""
