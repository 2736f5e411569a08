"""Data of the benchmark's tasks: images with labels, images to be rebuilt, and a text."""

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

from replica_newton.training.datasets import load_dataset

CONTEXT = 64
"""Characters in a sample of the text."""
_TEXT_TEST_EVERY = 10


@dataclass(frozen=True, eq=False)
class TaskData:
    """What a task trains on.

    Attributes:
        inputs: training samples, batch first.
        targets: what the criterion compares the network's outputs with.
        test_inputs: as `inputs`, never trained on.
        test_targets: as `targets`.
        classes: outputs of the network, for each prediction.
        description: what exactly it is; runs with different ones are never compared.
        floor: part of the training loss that no network can take away, as far as it is known; in nats a sample.
        test_floor: the same of the test set.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    description: str
    floor: float = 0.0
    test_floor: float = 0.0

    def limited(self, samples: int | None) -> "TaskData":
        """The same with fewer training samples.

        Args:
            samples: how many, the first ones; None for all.

        Returns:
            The data.
        """
        if samples is None or samples >= len(self.inputs):
            return self
        floor = _entropy(self.targets[:samples]) if self.floor else 0.0
        return TaskData(
            self.inputs[:samples],
            self.targets[:samples],
            self.test_inputs,
            self.test_targets,
            self.classes,
            f"{self.description}, the first {samples:,} samples",
            floor,
            self.test_floor,
        )


def labelled_images(name: str, path: Path | None) -> TaskData:
    """Standardised images and their classes.

    Args:
        name: of the data set, see `load_dataset`.
        path: of its files.

    Returns:
        The data.
    """
    found = load_dataset(name, path)
    description = f"{name}, {len(found.train_labels):,} training images"
    return TaskData(
        found.train_inputs, found.train_labels, found.test_inputs, found.test_labels, found.classes, description
    )


def images_to_rebuild(name: str, path: Path | None) -> TaskData:
    """Images of one channel as rows of pixels in 0 … 1, which are their own targets.

    The floor of their binary cross-entropy is the entropy of the grey pixels themselves.

    Args:
        name: of the data set, see `load_dataset`.
        path: of its files.

    Returns:
        The data.
    """
    found = load_dataset(name, path)
    low, high = found.train_inputs.min(), found.train_inputs.max()
    # Rounding may take a pixel out of the range in which a cross-entropy is one.
    train, test = (
        ((images - low) / (high - low)).clamp_(0.0, 1.0).flatten(1)
        for images in (found.train_inputs, found.test_inputs)
    )
    description = f"{name}, {len(train):,} training images, as their own targets"
    return TaskData(train, train, test, test, train.shape[1], description, _entropy(train), _entropy(test))


def text(_name: str = "text", _path: Path | None = None) -> TaskData:
    """The reference of the Python language that ships with CPython as `pydoc_data.topics`, cut into samples.

    English prose and code, about half a million characters. It differs a little from one version of Python to the
    next, so the description names the version and the digest of the text.

    Returns:
        Samples of 64 characters, whose targets are the characters one further on. Every tenth is a test sample.
    """
    whole = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    alphabet = sorted(set(whole))
    number = {character: index for index, character in enumerate(alphabet)}
    codes = torch.tensor([number[character] for character in whole])
    samples = (len(codes) - 1) // CONTEXT
    inputs, targets = (codes[shift : shift + samples * CONTEXT].view(samples, CONTEXT) for shift in (0, 1))
    held_out = torch.arange(samples) % _TEXT_TEST_EVERY == _TEXT_TEST_EVERY - 1
    digest = hashlib.sha256(whole.encode()).hexdigest()[:12]
    version = ".".join(platform.python_version_tuple()[:2])
    description = (
        f"pydoc_data.topics of Python {version}, {len(whole):,} characters, {len(alphabet)} different, sha256 {digest}"
    )
    return TaskData(
        inputs[~held_out], targets[~held_out], inputs[held_out], targets[held_out], len(alphabet), description
    )


Load = Callable[[str, Path | None], TaskData]


@lru_cache(maxsize=2)
def load_data(load: Load, name: str, path: Path | None, limit: int | None) -> TaskData:
    """Data of a task; a process keeps the last two.

    Args:
        load: one of this module's functions.
        name: of the data set.
        path: of its files; None searches as `load_dataset` does.
        limit: number of training samples.

    Returns:
        The data.
    """
    return load(name, path).limited(limit)


def _entropy(pixels: Tensor) -> float:
    """Mean over samples of the entropy of their pixels, each a probability; in nats a sample."""
    wide = pixels.double()
    return float(-(torch.xlogy(wide, wide) + torch.xlogy(1.0 - wide, 1.0 - wide)).sum() / len(pixels))
