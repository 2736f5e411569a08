"""One training run of the study: what defines it, how it is run and continued, and what is kept of it."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from replica_newton.files import replace_file
from replica_newton.reproduction.readings import PaperReplicas, reading_named
from replica_newton.reproduction.trainers import TRAINERS, Trainer
from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.loop import batches, evaluate
from replica_newton.training.models import Activation, reference_convnet
from replica_newton.training.run import finite_or_none, number_or_nan

Scaling = Literal["standard", "unit", "symmetric"]
"""Of the images: mean 0 and deviation 1 a channel; 0 … 1; −1 … 1."""

BATCH = 256
PLATEAU_NLL = 2.0
"""Below it the network has left the plateau of equal probabilities, ln 10 = 2.303."""
PLATEAU_WINDOW = 20
DIVERGED_NLL = 1e3


@dataclass(frozen=True)
class Experiment:
    """A run, whatever its length.

    Attributes:
        dataset: name of the data set.
        method: a key of `TRAINERS`, or the name of a reading.
        replicas: M. The global batch is the largest multiple of M up to 256: 252 for M = 6.
        rate: learning rate α.
        activation: of the reference convnet.
        scaling: of the images.
        seed: of the initial weights and of the order of the data.
        train_limit: number of training samples, the first ones; None for all.
    """

    dataset: str
    method: str
    replicas: int
    rate: float
    activation: Activation
    scaling: Scaling = "standard"
    seed: int = 0
    train_limit: int | None = None

    @property
    def key(self) -> str:
        """The settings in one word, for file names."""
        limit = f"-n{self.train_limit}" if self.train_limit else ""
        return (
            f"{self.dataset}-{self.method}-M{self.replicas}-rate{self.rate:g}-{self.activation}-{self.scaling}"
            f"-seed{self.seed}{limit}"
        )

    @property
    def label(self) -> str:
        """The settings in a few words."""
        replicas = f", M = {self.replicas}" if self.replicas > 1 else ""
        return f"{self.dataset}, {self.method}{replicas}, {self.activation}, rate {self.rate:g}"

    @property
    def batch_size(self) -> int:
        """Samples in the global batch."""
        return BATCH // self.replicas * self.replicas


@dataclass(frozen=True)
class Record:
    """What a run reached.

    Attributes:
        experiment: its settings.
        train_nll: one value an epoch: training NLL, mean over the epoch's batches (and over replicas, each on its own
            shard where it stands). A run that diverges ends with nan.
        gradient_evaluations: samples whose gradient was computed until the end of each epoch.
        steps_on_plateau: steps until the mean loss of the last 20 fell below 2.0; None if it never did.
        final_nll: training NLL of the network at the mean of the replicas after the last epoch; nan if it diverged.
        test_accuracy: of that network.
        seconds: training time on one core.
    """

    experiment: Experiment
    train_nll: tuple[float, ...] = ()
    gradient_evaluations: tuple[int, ...] = ()
    steps_on_plateau: int | None = None
    final_nll: float = math.nan
    test_accuracy: float = math.nan
    seconds: float = 0.0

    @property
    def diverged(self) -> bool:
        """Whether the last NLL is not finite; such a run goes no further."""
        return bool(self.train_nll) and not math.isfinite(self.train_nll[-1])

    def reaches(self, epochs: int) -> bool:
        """Whether there is nothing left to do for so many epochs.

        Args:
            epochs: number of epochs.

        Returns:
            True if it has run as long, or diverged before.
        """
        return self.diverged or len(self.train_nll) >= epochs

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it, None for nan."""
        return {
            name: [finite_or_none(one) for one in value] if isinstance(value, tuple) else finite_or_none(value)
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Record":
        """The record that `to_json` wrote.

        Args:
            entry: its output.

        Returns:
            The record.
        """
        return cls(
            experiment=Experiment(**entry["experiment"]),
            train_nll=tuple(map(number_or_nan, entry["train_nll"])),
            gradient_evaluations=tuple(entry["gradient_evaluations"]),
            steps_on_plateau=entry["steps_on_plateau"],
            final_nll=number_or_nan(entry["final_nll"]),
            test_accuracy=number_or_nan(entry["test_accuracy"]),
            seconds=entry["seconds"],
        )


def run_experiment(
    experiment: Experiment,
    epochs: int,
    dataset: Dataset,
    folder: Path | None = None,
    tell: Callable[[float], None] = lambda _: None,
) -> Record:
    """Train until so many epochs are done, from wherever the run stands.

    Args:
        experiment: the run.
        epochs: from its start.
        dataset: the data that it names, scaled.
        folder: where a checkpoint is kept after every epoch, so that the run can go on; None keeps none.
        tell: is told how many epochs are done, now and then.

    Returns:
        What it reached.
    """
    trainer = _trainer(experiment, dataset)
    record, recent = Record(experiment), []
    path = folder / f"{experiment.key}.pt" if folder is not None else None
    if path is not None and path.exists():
        saved = torch.load(path, weights_only=True)
        record, recent = Record.from_json(saved["record"]), saved["recent"]
        trainer.load_state_dict(saved["state"])
    while not record.reaches(epochs):
        record = _run_epoch(record, trainer, dataset, recent, tell)
        if path is not None:
            content = BytesIO()
            torch.save({"record": record.to_json(), "recent": recent, "state": trainer.state_dict()}, content)
            replace_file(path, content.getvalue())
    if record.diverged:
        return record
    network = trainer.network()
    final_nll, _ = evaluate(network, dataset.train_inputs, dataset.train_labels)
    _, accuracy = evaluate(network, dataset.test_inputs, dataset.test_labels)
    return Record(**vars(record) | {"final_nll": final_nll, "test_accuracy": accuracy})


def initial_network(experiment: Experiment, dataset: Dataset, replica: int = 0) -> nn.Module:
    """The reference convnet with the weights that a replica starts from.

    Args:
        experiment: its activation and seed count.
        dataset: shape and classes count.
        replica: m; 0 is where all start that start together.

    Returns:
        The network.
    """
    torch.manual_seed(experiment.seed + 1_000_003 * replica)
    return reference_convnet(dataset.input_shape, dataset.classes, activation=experiment.activation)


@lru_cache(maxsize=2)
def scaled_dataset(name: str, path: Path | None, scaling: Scaling, train_limit: int | None = None) -> Dataset:
    """A data set with its images scaled.

    Args:
        name: of the data set.
        path: of its files, see `load_dataset`.
        scaling: of the images.
        train_limit: number of training images.

    Returns:
        The data set.
    """
    dataset = load_dataset(name, path, train_limit=train_limit)
    if scaling == "standard":
        return dataset
    # Every channel of the training sets used here holds both extremes of its range.
    low, high = dataset.train_inputs.amin((0, 2, 3), keepdim=True), dataset.train_inputs.amax((0, 2, 3), keepdim=True)
    bottom, height = (0.0, 1.0) if scaling == "unit" else (-1.0, 2.0)
    for images in (dataset.train_inputs, dataset.test_inputs):
        images.sub_(low).mul_(height / (high - low)).add_(bottom)
    return dataset


def _trainer(experiment: Experiment, dataset: Dataset) -> Trainer:
    if experiment.method in TRAINERS:
        return TRAINERS[experiment.method](initial_network(experiment, dataset), experiment.replicas, experiment.rate)
    reading = reading_named(experiment.method)
    networks = [
        initial_network(experiment, dataset, m if reading.start == "different" else 0)
        for m in range(experiment.replicas)
    ]
    return PaperReplicas(networks, reading, experiment.rate)


def _run_epoch(
    record: Record, trainer: Trainer, dataset: Dataset, recent: list[float], tell: Callable[[float], None]
) -> Record:
    """One epoch more; `recent` holds the last losses as long as the run is on its plateau."""
    experiment, epoch = record.experiment, len(record.train_nll)
    size = len(dataset.train_labels)
    steps_per_epoch = size // experiment.batch_size
    total, evaluated, left = 0.0, 0, record.steps_on_plateau
    start = time.perf_counter()
    for step, indices in enumerate(batches(size, experiment.batch_size, experiment.seed, epoch)):
        try:
            loss, samples = trainer.step(dataset.train_inputs[indices], dataset.train_labels[indices])
        except FloatingPointError:
            loss, samples = math.nan, 0
        total, evaluated = total + loss, evaluated + samples
        if not abs(loss) <= DIVERGED_NLL:
            total = math.nan
            break
        if left is None:
            recent[:] = [*recent[-PLATEAU_WINDOW + 1 :], loss]
            if len(recent) == PLATEAU_WINDOW and sum(recent) < PLATEAU_NLL * PLATEAU_WINDOW:
                left = epoch * steps_per_epoch + step + 1
        if step % 20 == 0:
            tell(epoch + step / steps_per_epoch)
    before = record.gradient_evaluations[-1] if record.gradient_evaluations else 0
    return Record(
        experiment,
        (*record.train_nll, total / steps_per_epoch),
        (*record.gradient_evaluations, before + evaluated),
        left,
        seconds=record.seconds + time.perf_counter() - start,
    )
