"""The training loop: global batches split over replicas, evaluated and saved after every epoch."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from replica_newton.optim import ReplicaNewton
from replica_newton.topology import Simulated
from replica_newton.topology.processes import Processes
from replica_newton.training.datasets import Dataset
from replica_newton.training.methods import METHODS
from replica_newton.training.models import reference_convnet
from replica_newton.training.run import Epoch, Progress, RunState, save_run

EVALUATION_BATCH = 4096
SHARPNESS_EVERY = 20
"""Steps between two looks at the Ritz values for the display: they cost more than the step's own algebra."""


class Observer(Protocol):
    """What the loop tells as it goes; `report.progress.TrainingProgress` shows it."""

    def start_run(self, label: str, *, epochs: int, steps_per_epoch: int, completed_steps: int = 0) -> None:
        """A run starts or goes on."""

    def step(self, *, loss: float, sharpness: float | None, learning_rate: float | None) -> None:
        """A step was taken."""

    def finish_epoch(self, *, epoch: int, train_nll: float, test_accuracy: float) -> None:
        """An epoch was evaluated and saved."""

    def finish_run(self) -> None:
        """The run is finished."""


class Watch(Protocol):
    """What looks at the model before every step and leaves it as it was; `training.watch.CurvatureWatch` is one."""

    def start(
        self, model: nn.Module, optimizer: Optimizer, completed_steps: int, topology: Simulated | Processes
    ) -> None:
        """A run starts or goes on."""

    def observe(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """A step is about to be taken on this batch."""


def train(
    state: RunState,
    dataset: Dataset,
    folder: Path | None,
    observer: Observer,
    watch: Watch | None = None,
    *,
    topology: Simulated | Processes | None = None,
    leave: Callable[[Optimizer], bool] = lambda _: False,
) -> None:
    """Train until the run is finished, from wherever it stands, or until it is told to leave.

    A run that was interrupted goes on from its last finished epoch, one that left from the step after which it did;
    both end at the same bits as one that did neither. A run whose loss or gradient ceases to be finite ends there, with
    a training NLL of nan. A server of a `ParameterServer` serves until the workers are done.

    Args:
        state: the run; changed in place as epochs finish.
        dataset: the data that its config names; the network lives on their device.
        folder: where to save after every epoch; None saves nothing.
        observer: is told of every step and epoch.
        watch: looks on; its gradients are not counted as the run's, its time is.
        topology: of the processes, which all call this; None for replicas in this one.
        leave: asked with the optimizer after every step but an epoch's last: whether to save and leave; says the same
            in all processes.

    Raises:
        RunError: if the batch is larger than the training set.
    """
    config = state.config
    config.check_fits(len(dataset.train_labels))
    steps_per_epoch = len(dataset.train_labels) // config.batch_size
    torch.manual_seed(config.seed)
    model = reference_convnet(dataset.input_shape, dataset.classes, activation=config.activation)
    model.to(dataset.train_inputs.device)
    topology = topology or Simulated(config.replicas)
    rate = config.learning_rate or 0.0
    optimizer = METHODS[config.method].make(model.parameters(), rate, topology)
    if state.random_state is not None:
        model.load_state_dict(state.model)
        optimizer.load_state_dict(deepcopy(state.optimizer))
        torch.set_rng_state(state.random_state)
    newton = optimizer if isinstance(optimizer, ReplicaNewton) else None

    def save(steps: int) -> None:
        # Copies, because steps change tensors in place, and an interrupted epoch must leave no trace.
        state.model, state.optimizer = deepcopy((model.state_dict(), optimizer.state_dict()))
        state.random_state = torch.get_rng_state()
        if folder is not None:
            save_run(state, folder, topology, steps=steps)

    if newton is not None and isinstance(topology, Processes) and not topology.is_worker:
        newton.serve(save)
        return
    completed = len(state.history) * steps_per_epoch + state.progress.steps
    observer.start_run(config.label, epochs=config.epochs, steps_per_epoch=steps_per_epoch, completed_steps=completed)
    if watch is not None:
        watch.start(model, optimizer, completed, topology)
    left = False
    while not state.finished and not left:
        left = _train_epoch(state, dataset, model, topology, optimizer, observer, watch, leave)
        steps = len(state.history) * steps_per_epoch + state.progress.steps
        if newton is not None:
            newton.checkpoint(steps, save)
        else:
            save(steps)
        if not left:
            epoch = state.history[-1]
            observer.finish_epoch(epoch=epoch.epoch, train_nll=epoch.train_nll, test_accuracy=epoch.test_accuracy)
    if newton is not None:
        newton.close()
    observer.finish_run()


def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean negative log-likelihood and accuracy over a whole set.

    Args:
        model: returns logits.
        inputs: `(n, ...)`.
        labels: `(n,)` classes.

    Returns:
        NLL in nats and the fraction of samples classified correctly.
    """
    was_training = model.training
    model.eval()
    nll, correct = 0.0, 0
    with torch.no_grad():
        for x, y in zip(torch.split(inputs, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True):
            logits = model(x)
            nll += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(dim=1) == y).sum())
    model.train(was_training)
    return nll / len(labels), correct / len(labels)


def batches(size: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Indices of the batches of an epoch; the last, smaller batch is dropped.

    Args:
        size: number of training samples.
        batch_size: samples in a batch.
        seed: of the order of the data.
        epoch: from 0. The order depends on seed and epoch alone, so that a run that goes on sees the same.

    Yields:
        `(batch_size,)` indices.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(size, generator=generator)
    for start in range(0, size - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def _train_epoch(
    state: RunState,
    dataset: Dataset,
    model: nn.Module,
    topology: Simulated | Processes,
    optimizer: Optimizer,
    observer: Observer,
    watch: Watch | None,
    leave: Callable[[Optimizer], bool],
) -> bool:
    """The rest of an epoch and its evaluation; returns whether the run is to leave before the epoch is over."""
    config, begun = state.config, state.progress
    before = state.history[-1] if state.history else Epoch(0, 0.0, 0.0, 0.0, 0, 0.0, fallbacks=0)
    total, steps, evaluations, sharpness = begun.loss, begun.steps, begun.gradient_evaluations, None
    start = time.perf_counter() - begun.seconds
    train_nll = math.nan
    try:
        indices = batches(len(dataset.train_labels), config.batch_size, config.seed, before.epoch)
        for batch in islice(indices, begun.steps, None):
            shard = _share(batch, topology)
            inputs, labels = dataset.train_inputs[shard], dataset.train_labels[shard]
            closure = topology.closure(model, nn.functional.cross_entropy, inputs, labels)
            if watch is not None:
                watch.observe(model, inputs, labels)
            loss = math.nan
            try:
                loss = float(optimizer.step(closure))  # type: ignore[arg-type]
            finally:
                evaluations += closure.samples_evaluated
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss is {loss}")
            total, steps = total + loss, steps + 1
            if steps % SHARPNESS_EVERY == 1:
                sharpness, _ = _sharpness(optimizer)
            observer.step(loss=loss, sharpness=sharpness, learning_rate=float(optimizer.param_groups[0]["lr"]))
            if steps < len(dataset.train_labels) // config.batch_size and leave(optimizer):
                state.progress = Progress(steps, total, evaluations, time.perf_counter() - start)
                _synchronise(optimizer)
                return True
        finished = True
    except FloatingPointError:
        finished = False
    seconds = time.perf_counter() - start
    with optimizer.averaged() if isinstance(optimizer, ReplicaNewton) else nullcontext():
        if finished:
            train_nll, _ = _evaluate(model, dataset.train_inputs, dataset.train_labels, optimizer)
        _, test_accuracy = _evaluate(model, dataset.test_inputs, dataset.test_labels, optimizer)
    sharpness, residual = _sharpness(optimizer)
    epoch = Epoch(
        epoch=before.epoch + 1,
        train_loss=total / steps if steps else math.nan,
        train_nll=train_nll,
        test_accuracy=test_accuracy,
        gradient_evaluations=before.gradient_evaluations + evaluations,
        seconds=before.seconds + seconds,
        sharpness=sharpness,
        sharpness_residual=residual,
        fallbacks=optimizer.fallbacks if isinstance(optimizer, ReplicaNewton) else None,
    )
    state.history.append(epoch)
    state.progress = Progress()
    return False


def _synchronise(optimizer: Optimizer) -> None:
    if isinstance(optimizer, ReplicaNewton):
        optimizer.synchronise()


def _share(rows: Tensor, topology: Simulated | Processes) -> Tensor:
    """This process's part of a batch or of a set: all of it in one process, one replica's over several."""
    if not isinstance(topology, Processes):
        return rows
    return rows.tensor_split(topology.replicas)[topology.replica or 0]


def _evaluate(model: nn.Module, inputs: Tensor, labels: Tensor, optimizer: Optimizer) -> tuple[float, float]:
    """Mean negative log-likelihood and accuracy over a whole set, of which each worker evaluates a part."""
    topology = optimizer.topology if isinstance(optimizer, ReplicaNewton) else None
    if not isinstance(optimizer, ReplicaNewton) or not isinstance(topology, Processes):
        return evaluate(model, inputs, labels)

    def sums() -> Tensor:
        part = _share(labels, topology)
        means = evaluate(model, _share(inputs, topology), part) if len(part) else (0.0, 0.0)
        return torch.tensor(means, dtype=torch.float64) * len(part)

    nll, accuracy = (optimizer.total(sums) / len(labels)).tolist()
    return nll, accuracy


def _sharpness(optimizer: Optimizer) -> tuple[float | None, float | None]:
    """Largest Ritz value of the last secants and its residual; none from own shards, whose secants are mostly noise."""
    if not isinstance(optimizer, ReplicaNewton) or optimizer.secant_data == "own" or optimizer.curvature is None:
        return None, None
    pairs = optimizer.curvature.ritz_pairs
    if not pairs.values.numel():
        return None, None
    top = int(pairs.values.argmax())
    return float(pairs.values[top]), float(pairs.residuals[top])
