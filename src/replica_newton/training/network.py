"""A saved network: from a run of `train`, from checkpoints, or a plain `state_dict` of the reference convnet."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replica_newton.checkpoints import CheckpointError
from replica_newton.checkpoints.folder import newest_checkpoint
from replica_newton.topology import Simulated
from replica_newton.training.datasets import Dataset
from replica_newton.training.models import Activation, reference_convnet
from replica_newton.training.run import RunError, load_run


def load_network(path: Path, dataset: Dataset, *, activation: Activation = "relu") -> nn.Module:
    """The reference convnet as it was saved, in evaluation mode.

    Args:
        path: the folder of a run, one that `save_checkpoint` wrote to, or a file of
            `torch.save(model.state_dict(), file)`.
        dataset: gives the shape of the inputs and the number of classes; a run must have been trained on it.
        activation: of a network saved without its settings; a run knows its own.

    Returns:
        The network.

    Raises:
        RunError: if there is nothing saved there, it cannot be read, holds another network or a run on another data
            set.
    """
    run = load_run(path) if path.is_dir() else None
    if run is not None:
        if run.config.dataset != dataset.name:
            raise RunError(f"the saved run was trained on {run.config.dataset}, got {dataset.name}")
        state, activation = run.model, run.config.activation
    else:
        state = _newest(path) if path.is_dir() else _file(path)
    model = reference_convnet(dataset.input_shape, dataset.classes, activation=activation)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        shape = "×".join(map(str, dataset.input_shape))
        raise RunError(f"{path} must hold the reference convnet for {shape} inputs, got another network") from error
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise RunError(f"{path} must hold finite parameters, got nan or infinity")
    return model.eval()


def _newest(folder: Path) -> dict[str, Any]:
    """The module in the newest checkpoint of a folder."""
    try:
        saved = newest_checkpoint(folder, Simulated(1))
        content = {} if saved is None else saved.content(saved.layout.first_worker)
    except CheckpointError as error:
        raise RunError(str(error)) from error
    if "module" not in content:
        raise RunError(f"{folder}: no such checkpoint")
    return dict(content["module"])


def _file(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise RunError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises whatever zip, pickle and the operating system raise
        raise RunError(f"{path}: not a readable checkpoint ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, dict) or not content:
        raise RunError(f"{path} must hold a state_dict, got {type(content).__name__}")
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise RunError(f"{path} must hold a state_dict of tensors, got other values")
    return content
