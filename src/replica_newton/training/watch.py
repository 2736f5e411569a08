"""Watching a run: live curvature, and its numbers handed to trackers."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from replica_newton.monitor import CurvatureMonitor, CurvatureObservation
from replica_newton.optim import ReplicaNewton
from replica_newton.topology import LocalClosure, ReplicaClosure, Simulated, Topology, TreeReduction
from replica_newton.trackers import Tracker
from replica_newton.training.loop import Observer

logger = logging.getLogger(__name__)

RANK = 8
Report = Callable[[int, CurvatureObservation], None]


class CurvatureWatch:
    """A `CurvatureMonitor` over the batches that a run trains on; the run itself stays as it is, bit for bit.

    As many replicas as divide the batch, at most 8, probe a direction each, on their own shards; over a tree, all of
    its replicas, each in its process.

    Args:
        every: steps from one probe to the next.
        report: is told the number of the step that is about to be taken, from 1, and what was seen.

    Raises:
        ValueError: if `every` is below 1.
    """

    def __init__(self, every: int, report: Report) -> None:
        if every < 1:
            raise ValueError(f"{every=} must be >= 1")
        self._every, self._report = every, report
        self._monitor: CurvatureMonitor | None = None
        self._optimizer: Optimizer | None = None
        self._step = 0

    def start(
        self, model: nn.Module, optimizer: Optimizer, completed_steps: int, topology: Topology | None = None
    ) -> None:
        """A run starts or goes on; the tracked space begins anew.

        Args:
            model: that is trained.
            optimizer: by which.
            completed_steps: steps taken before.
            topology: of the processes, all of which call this; None for one alone.
        """
        tree = topology if isinstance(topology, TreeReduction) else None
        self._monitor = CurvatureMonitor(model, rank=RANK, every=self._every, optimizer=optimizer, topology=tree)
        self._optimizer = optimizer
        self._step = completed_steps

    def observe(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """A step is about to be taken on a batch.

        Args:
            model: that is trained.
            inputs: of the batch; of several processes, of this one's part.
            targets: of the batch.
        """
        if self._monitor is None:
            return
        try:
            seen = self._monitor.observe(self._closure(self._monitor, model, inputs, targets))
        except FloatingPointError as error:  # the run itself will find out, or survive
            logger.warning("no curvature: %s", error)
            seen = None
        self._step += 1
        if seen is not None:
            self._report(self._step, seen)

    def _closure(
        self, monitor: CurvatureMonitor, model: nn.Module, inputs: Tensor, targets: Tensor
    ) -> ReplicaClosure | LocalClosure:
        """The replicas that probe, all at the same parameters."""
        loss = nn.functional.cross_entropy
        if not isinstance(monitor.topology, TreeReduction):
            replicas = max(m for m in range(1, RANK + 1) if len(targets) % m == 0)
            return Simulated(replicas).closure(model, loss, inputs, targets)
        if monitor.steps % monitor.every == 0 and isinstance(self._optimizer, ReplicaNewton):
            self._optimizer.synchronise()  # the step that follows parts them again, to the bits where they were
        return monitor.topology.closure(model, loss, inputs, targets)


class TrackedRun:
    """Observer that passes everything on to another one, and logs it to trackers.

    Args:
        display: the other observer.
        trackers: where numbers go: `loss`, `learning_rate` and `sharpness` (of the method's own secants) of every
            step, `train_nll` and `test_accuracy` of every epoch.
        show_loss: is told the loss of every step.
    """

    def __init__(
        self, display: Observer, trackers: Sequence[Tracker], show_loss: Callable[[float], None] | None = None
    ) -> None:
        self._display, self._trackers, self._show_loss = display, trackers, show_loss
        self._step = 0

    def start_run(self, label: str, *, epochs: int, steps_per_epoch: int, completed_steps: int = 0) -> None:
        """See `Observer`."""
        self._step = completed_steps
        self._display.start_run(label, epochs=epochs, steps_per_epoch=steps_per_epoch, completed_steps=completed_steps)

    def step(self, *, loss: float, sharpness: float | None, learning_rate: float | None) -> None:
        """See `Observer`."""
        self._step += 1
        values = {"loss": loss, "sharpness": sharpness, "learning_rate": learning_rate}
        log_finite(self._trackers, self._step, values)
        if self._show_loss is not None:
            self._show_loss(loss)
        self._display.step(loss=loss, sharpness=sharpness, learning_rate=learning_rate)

    def finish_epoch(self, *, epoch: int, train_nll: float, test_accuracy: float) -> None:
        """See `Observer`."""
        log_finite(self._trackers, self._step, {"train_nll": train_nll, "test_accuracy": test_accuracy})
        self._display.finish_epoch(epoch=epoch, train_nll=train_nll, test_accuracy=test_accuracy)

    def finish_run(self) -> None:
        """See `Observer`."""
        self._display.finish_run()


def log_finite(trackers: Sequence[Tracker], step: int, values: Mapping[str, float | None]) -> None:
    """Log the values that are there and finite; not every tracker takes others.

    Args:
        trackers: where they go.
        step: number of the step, from 1.
        values: by name.
    """
    finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    if finite:
        for tracker in trackers:
            tracker.log(step, finite)


def curvature_values(seen: CurvatureObservation) -> dict[str, float | None]:
    """Numbers of an observation, by the names under which they are logged.

    Args:
        seen: what was seen.

    Returns:
        Sharpness, that in the optimizer's metric, its part of what is stable, captured fraction, noise scale, and the
        eigenvalues, numbered from 1.
    """
    values = {f"eigenvalue_{i}": value for i, value in enumerate(seen.eigenvalues.tolist(), start=1)}
    return {
        f"curvature/{name}": value
        for name, value in {
            "sharpness": seen.sharpness,
            "preconditioned_sharpness": seen.preconditioned_sharpness,
            "stability_ratio": seen.stability_ratio,
            "captured_gradient_fraction": seen.captured_gradient_fraction,
            "gradient_noise_scale": seen.gradient_noise_scale,
            **values,
        }.items()
    }
