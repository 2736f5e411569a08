"""The tasks of the benchmark: data, network, loss, batch and budget."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from replica_newton.benchmark.data import CONTEXT, Load, TaskData, images_to_rebuild, labelled_images, load_data, text
from replica_newton.benchmark.models import CausalTransformer, autoencoder, mlp
from replica_newton.topology.simulated import Criterion
from replica_newton.training.models import Activation, reference_convnet

BATCH_MULTIPLE = 8
"""Every batch is a multiple of it, so that up to eight replicas share it equally."""


@dataclass(frozen=True)
class Task:
    """A network to train.

    Attributes:
        label: what a person reads.
        network: what is trained, in a few words.
        data: name of the data set.
        load: reads it.
        model: makes the network for the data.
        criterion: mean over samples of the negative log-likelihood, in nats.
        batch_size: samples in a batch, at most; never more than there are, and a multiple of 8.
        epochs: budget of a run: samples whose gradient may be computed, in training sets.
        quick_limit: training samples of the quick version; None for all.
    """

    label: str
    network: str
    data: str
    load: Load
    model: Callable[[TaskData], nn.Module]
    criterion: Criterion
    batch_size: int
    epochs: int
    quick_limit: int | None

    def read(self, path: Path | None, limit: int | None = None) -> TaskData:
        """The task's data.

        Args:
            path: where the files are; None searches, built-in data are found anyway.
            limit: number of training samples; None for all.

        Returns:
            The data.
        """
        return load_data(self.load, self.data, None if self.built_in else path, limit)

    @property
    def built_in(self) -> bool:
        """Whether its data need no file."""
        return self.data in {"digits", "text"}

    def batch_for(self, samples: int) -> int:
        """Samples in a batch.

        Args:
            samples: of the training set, at least 8.

        Returns:
            The batch size.
        """
        return min(self.batch_size, samples) // BATCH_MULTIPLE * BATCH_MULTIPLE


def _rebuilding_loss(logits: Tensor, pixels: Tensor) -> Tensor:
    """Nats an image, not a pixel."""
    return binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


def _character_loss(logits: Tensor, characters: Tensor) -> Tensor:
    """Nats a character; samples have equally many, so it is a mean over samples, too."""
    return cross_entropy(logits.flatten(0, 1), characters.flatten())


def _convnet(
    data: str, title: str, activation: Activation, *, batch_size: int = 256, epochs: int = 5, quick_limit: int = 2048
) -> Task:
    name = {"relu": "ReLU", "tanh": "tanh"}[activation]

    def model(found: TaskData) -> nn.Module:
        channels, height, width = found.inputs.shape[1:]
        return reference_convnet((channels, height, width), found.classes, activation=activation)

    return Task(
        f"{title}, {name}, batch {batch_size}",
        f"reference convnet, {name}",
        data,
        labelled_images,
        model,
        cross_entropy,
        batch_size,
        epochs,
        quick_limit,
    )


def _digits(title: str, *, batch_size: int, epochs: int) -> Task:
    return Task(
        f"digits, MLP, {title}",
        "MLP 64-64-32-10, tanh",
        "digits",
        labelled_images,
        lambda found: mlp(found.inputs[0].numel(), (64, 32), found.classes),
        cross_entropy,
        batch_size,
        epochs,
        None,
    )


def _autoencoder(*, batch_size: int, epochs: int) -> Task:
    return Task(
        f"MNIST, autoencoder, batch {batch_size:,}",
        "autoencoder 784-250-120-60-30 and back, logistic units",
        "mnist",
        images_to_rebuild,
        lambda found: autoencoder(found.classes),
        _rebuilding_loss,
        batch_size,
        epochs,
        2048,
    )


TASKS: dict[str, Task] = {
    "mnist-relu": _convnet("mnist", "MNIST", "relu"),
    "mnist-tanh": _convnet("mnist", "MNIST", "tanh"),
    "mnist-relu-2048": _convnet("mnist", "MNIST", "relu", batch_size=2048, epochs=10),
    "cifar10-relu": _convnet("cifar10", "CIFAR-10", "relu"),
    "digits-mlp": _digits("batch 256", batch_size=256, epochs=60),
    "digits-mlp-full": _digits("full batch", batch_size=1432, epochs=200),
    "text-transformer": Task(
        "text, transformer, batch 32 × 64",
        "causal transformer, 2 blocks of width 64",
        "text",
        text,
        lambda found: CausalTransformer(found.classes, CONTEXT),
        _character_loss,
        32,
        3,
        256,
    ),
    "autoencoder": _autoencoder(batch_size=256, epochs=5),
    "autoencoder-2048": _autoencoder(batch_size=2048, epochs=10),
}
"""By name; the order is that of tables and figures. The "full batch" of digits is 1,432 of 1,437, a multiple of 8."""
