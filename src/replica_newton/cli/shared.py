"""Options and habits that commands share."""

import os
import platform
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

import replica_newton
from replica_newton.training.datasets import DATA_FOLDER_VARIABLE, DATASETS
from replica_newton.training.run import RunError

USAGE_ERROR = 2
INTERRUPTED = 130


class Activation(StrEnum):
    """Activations of the reference network."""

    relu = "relu"
    tanh = "tanh"


DatasetOption = Annotated[str, typer.Option(help=f"Data set: {', '.join(DATASETS)} (digits are built in).")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help=f".npz file, or folder with IDX or CIFAR-10 binary files; by default the folder in {DATA_FOLDER_VARIABLE}."
    ),
]
EpochsOption = Annotated[int, typer.Option(help="Passes over the training set.")]
BatchOption = Annotated[
    int | None,
    typer.Option(
        help="Samples in the global batch, split over the replicas; by default 256, for digits (a small set) 64."
    ),
]
ActivationOption = Annotated[Activation, typer.Option(help="Activation of the reference network.")]
ThreadsOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Threads of torch. Bits are the same for the same number; more than one helps an idle machine alone.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or cuda:1 for one of several GPUs.")]
PROCESSORS = os.cpu_count() or 1
WorkersOption = Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each; by default one a processor.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Forget what has been run before.")]
LimitOption = Annotated[int | None, typer.Option(help="Train on this many samples only, the first ones.")]


def end_interrupted(what: str) -> NoReturn:
    """Say what an interruption means for the user, and leave."""
    sys.stderr.write(f"replica-newton: interrupted {what}\n".replace(" ;", ";"))
    raise typer.Exit(INTERRUPTED)


def make_folder(folder: Path) -> None:
    """Fail before training rather than after its first epoch."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"{folder} must be writable")


def command_line() -> str:
    """As it was typed, for a page or a report."""
    return shlex.join(["replica-newton", *sys.argv[1:]])


def environment() -> dict[str, str]:
    """Versions, machine and command line, for a report."""
    return {
        "replica-newton": replica_newton.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processors": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "command": command_line(),
    }
