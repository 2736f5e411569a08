"""A saved network: from a checkpoint of `train`, or a plain `state_dict` of the reference convnet."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replica_newton.training.datasets import Dataset
from replica_newton.training.models import Activation, reference_convnet
from replica_newton.training.run import CHECKPOINT, RunError


def load_network(path: Path, dataset: Dataset, *, activation: Activation = "relu") -> nn.Module:
    """The reference convnet as it was saved, in evaluation mode.

    Args:
        path: the folder of a run, its checkpoint, or a file of `torch.save(model.state_dict(), file)`.
        dataset: gives the shape of the inputs and the number of classes; a run must have been trained on it.
        activation: of a network saved without its settings; a run knows its own.

    Returns:
        The network.

    Raises:
        RunError: if there is no such file, it cannot be read, holds another network or a run on another data set.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise RunError(f"{file}: no such checkpoint") from None
    except Exception as error:  # torch.load raises whatever zip, pickle and the operating system raise
        raise RunError(f"{file}: not a readable checkpoint ({str(error).partition(chr(10))[0]})") from error
    state, activation = _state_of(file, content, dataset, activation)
    model = reference_convnet(dataset.input_shape, dataset.classes, activation=activation)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        shape = "×".join(map(str, dataset.input_shape))
        raise RunError(f"{file} must hold the reference convnet for {shape} inputs, got another network") from error
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise RunError(f"{file} must hold finite parameters, got nan or infinity")
    return model.eval()


def _state_of(
    file: Path, content: Any, dataset: Dataset, activation: Activation
) -> tuple[dict[str, Tensor], Activation]:
    """The `state_dict` in a file, and the activation of its network."""
    if not isinstance(content, dict) or not content:
        raise RunError(f"{file} must hold a run or a state_dict, got {type(content).__name__}")
    if all(isinstance(value, Tensor) for value in content.values()):
        return content, activation
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("model"), dict):
        raise RunError(f"{file} must hold a run or a state_dict, got neither")
    config = content["config"]
    if config.get("dataset") != dataset.name:
        raise RunError(f"the saved run was trained on {config.get('dataset')}, got {dataset.name}")
    return content["model"], config["activation"]
