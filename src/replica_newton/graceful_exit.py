"""Ending a run at SIGTERM, after a checkpoint, in all its processes at the same step."""

import signal
from types import FrameType, TracebackType

import torch
from torch.optim import Optimizer

from replica_newton.optim import ReplicaNewton

TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, 143: what a shell reports of a process that it ended, so that nobody takes it for done."""


class GracefulExit:
    """Context in which SIGTERM does not end the process but says so, after each step, in all processes at once.

        with GracefulExit() as graceful:
            for step in range(start, steps):
                optimizer.step(closure)
                if graceful.agreed(optimizer):
                    save_checkpoint(folder, step + 1, model, optimizer)
                    break
            optimizer.close()

    At the end of the block a process that agreed to leave does so by `SystemExit` with status 143, which tells
    `torchrun`, schedulers and shells that the work is not done. A server of `ParameterServer` calls `optimizer.serve`
    in such a block and leaves when the workers close. Only the main thread may enter it.

    Attributes:
        received: whether this process was told to end.
        leaving: whether any was, and all have agreed to.
    """

    def __init__(self) -> None:
        self.received = False
        self.leaving = False

    def __enter__(self) -> "GracefulExit":
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self.leaving and error is None:
            raise SystemExit(TERMINATED)

    def agreed(self, optimizer: Optimizer) -> bool:
        """Whether a process was told to end: the same answer in all, by one more collective of one number.

        Args:
            optimizer: over any topology; all processes with a replica call this after the same step.

        Returns:
            Whether to save a checkpoint and leave.
        """
        if isinstance(optimizer, ReplicaNewton):
            self.leaving = bool(optimizer.total(lambda: torch.tensor([self.received], dtype=torch.float64)))
        else:
            self.leaving = self.received
        return self.leaving

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.received = True
