"""One training run of the benchmark: what defines it, how it is run, and what is kept of it."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from replica_newton.benchmark.data import TaskData
from replica_newton.benchmark.optimizers import METHODS
from replica_newton.benchmark.steppers import Stepper
from replica_newton.benchmark.tasks import TASKS
from replica_newton.files import rounded
from replica_newton.topology.simulated import Criterion
from replica_newton.training.loop import batches
from replica_newton.training.run import finite_or_none, number_or_nan

POINTS = 20
"""Of a curve, equally far apart in gradient evaluations."""
_CURVE_DIGITS = 4
"""Of losses and seconds along it, which are drawn: most of a file of results is curves."""
DIVERGED_FACTOR = 100.0
"""A loss so many times the first one is given up."""
_EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        task: a key of `TASKS`.
        method: a key of `METHODS`.
        rate: its learning rate.
        seed: of the initial weights, the order of the data and the method's own random numbers.
        epochs: budget of gradient evaluations, in training sets.
        train_limit: number of training samples, the first ones; None for all.
        tentative: whether it stands in for a choice that has still to be made; no part of what it is.
    """

    task: str
    method: str
    rate: float
    seed: int
    epochs: int
    train_limit: int | None = None
    tentative: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        """The settings in one word."""
        limit = f"-n{self.train_limit}" if self.train_limit else ""
        return f"{self.task}-{self.method}-rate{self.rate:g}-seed{self.seed}-epochs{self.epochs}{limit}"

    @property
    def label(self) -> str:
        """The settings in a few words."""
        return f"{self.task}, {METHODS[self.method].label}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Record:
    """What a run reached.

    Attributes:
        run: its settings.
        data: what exactly it was trained on.
        final_nll: of the network after the last step, over the whole training set, in evaluation mode and less the
            data's floor; nan if the run diverged.
        last_epoch_nll: mean loss of the batches, as they were trained on, of the last epoch of the budget.
        test_nll: as `final_nll`, over the test set.
        curve: (gradient evaluations, seconds, mean loss of the batches since the point before).
        evaluations: samples whose gradient was computed, probes included.
        steps: of the optimizer.
        seconds: of training on one processor: time of the process's one thread, so that it does not depend on what
            else the machine does. On an idle machine it is the time on the wall.
    """

    run: Run
    data: str
    final_nll: float
    last_epoch_nll: float
    test_nll: float
    curve: tuple[tuple[int, float, float], ...]
    evaluations: int
    steps: int
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether there is no finite loss at its end."""
        return not math.isfinite(self.final_nll)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it, None for nan."""
        entry = {name: finite_or_none(value) for name, value in asdict(self).items()}
        del entry["run"]["tentative"]
        curve = [[finite_or_none(value) for value in point] for point in self.curve]
        return entry | {"curve": rounded(curve, _CURVE_DIGITS)}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Record":
        """The record that `to_json` wrote.

        Args:
            entry: its output.

        Returns:
            The record.
        """
        curve = tuple((int(at), float(seconds), number_or_nan(nll)) for at, seconds, nll in entry["curve"])
        losses = {name: number_or_nan(entry[name]) for name in ("final_nll", "last_epoch_nll", "test_nll")}
        return cls(**entry | losses | {"run": Run(**entry["run"]), "curve": curve})


def do_run(run: Run, data: TaskData, tell: Callable[[float], None] = lambda _: None) -> Record:
    """Train until the budget is spent.

    The rate falls from its value to zero along half a cosine of the share of the budget that is spent. A method that
    spends more on a step therefore takes fewer steps.

    Args:
        run: what to do.
        data: of its task.
        tell: is told how many epochs of the budget are spent, now and then.

    Returns:
        What it reached.
    """
    task, samples = TASKS[run.task], len(data.inputs)
    torch.manual_seed(run.seed)
    module = task.model(data)
    stepper = METHODS[run.method].make(module, task.criterion, run.rate)
    budget, spent, losses = run.epochs * samples, 0, _Losses(run.epochs * samples, samples, data.floor)
    start = time.process_time()
    for indices in _endless_batches(samples, task.batch_for(samples), run.seed):
        stepper.scale_rate(0.5 * (1.0 + math.cos(math.pi * spent / budget)))
        loss, evaluated = _step(stepper, data.inputs[indices], data.targets[indices])
        spent += evaluated
        losses.add(loss, spent, time.process_time() - start)
        if losses.diverged or spent >= budget:
            break
        tell(spent / samples)
    seconds = time.process_time() - start
    final = test = math.nan
    if not losses.diverged:
        with stepper.evaluating():
            final = whole_loss(module, task.criterion, data.inputs, data.targets) - data.floor
            test = whole_loss(module, task.criterion, data.test_inputs, data.test_targets) - data.test_floor
    return Record(
        run,
        data.description,
        final,
        losses.last_epoch,
        test,
        tuple(losses.curve),
        spent,
        losses.steps,
        seconds,
    )


def whole_loss(module: nn.Module, criterion: Criterion, inputs: Tensor, targets: Tensor) -> float:
    """Loss over a whole set, in evaluation mode.

    Args:
        module: the network.
        criterion: a mean over samples.
        inputs: all samples.
        targets: theirs.

    Returns:
        The mean.
    """
    module.eval()
    total = 0.0
    with torch.no_grad():
        for x, y in zip(torch.split(inputs, _EVALUATION_BATCH), torch.split(targets, _EVALUATION_BATCH), strict=True):
            total += float(criterion(module(x), y)) * len(x)
    module.train()
    return total / len(inputs)


class _Losses:
    """Losses of batches, gathered into the points of a curve.

    Args:
        budget: gradient evaluations in all.
        epoch: gradient evaluations of the last epoch.
        floor: is taken off.
    """

    def __init__(self, budget: int, epoch: int, floor: float) -> None:
        self._budget, self._epoch, self._floor = budget, epoch, floor
        self._since: list[float] = []
        self._last_epoch: list[float] = []
        self._first = math.nan
        self.curve: list[tuple[int, float, float]] = []
        self.steps = 0
        self.diverged = False

    def add(self, loss: float, spent: int, seconds: float) -> None:
        """Take in a step's loss, and the gradient evaluations and seconds until after the step."""
        self.steps += 1
        if self.steps == 1:
            self._first = loss
        self.diverged = not abs(loss) <= DIVERGED_FACTOR * abs(self._first)
        loss = math.nan if self.diverged else loss - self._floor
        self._since.append(loss)
        if spent > self._budget - self._epoch:
            self._last_epoch.append(loss)
        if self.diverged or spent >= self._budget * (len(self.curve) + 1) / POINTS:
            self.curve.append((spent, seconds, _mean(self._since)))
            self._since.clear()

    @property
    def last_epoch(self) -> float:
        """Mean loss of the last epoch; nan if the run diverged."""
        return math.nan if self.diverged else _mean(self._last_epoch)


def _endless_batches(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    for epoch in count():
        yield from batches(samples, batch_size, seed, epoch)


def _step(stepper: Stepper, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
    """A step; nan where the method has lost its footing."""
    try:
        return stepper.step(inputs, targets)
    except (FloatingPointError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return math.nan, len(inputs)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
