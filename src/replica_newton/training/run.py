"""One training run: what defines it, what it has reached, and how it is saved."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from replica_newton.checkpoints.folder import CheckpointError, newest_checkpoint, write_checkpoint
from replica_newton.files import replace_file
from replica_newton.topology import Simulated, Topology
from replica_newton.topology.estimate import Kind
from replica_newton.training.methods import METHODS
from replica_newton.training.models import Activation

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
MAX_SEED = 2**32 - 1
MAX_RATE = 1e30
"""Well inside fp32, beyond which torch's optimizers raise instead of diverging."""


class RunError(ValueError):
    """A run that cannot be started or continued; the message names the rule and the value got."""


def check_places(folder: Path, data: Path | None = None) -> None:
    """Fail before anything is run where results or data have no place.

    Args:
        folder: of the results; it need not be there.
        data: file or folder of the data, if one was named.

    Raises:
        RunError: if the folder is a file, or the data are nowhere.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} must be a folder, got a file")
    if data is not None and not data.exists():
        raise RunError(f"data must be in a file or folder that is there, got {data}")


@dataclass(frozen=True)
class RunConfig:
    """Settings that determine a run, bit for bit on one CPU with one number of threads.

    Attributes:
        dataset: name of the data set.
        method: name in `METHODS`.
        replicas: M, divides the batch size.
        epochs: passes over the training set.
        learning_rate: rate of the method, in (0, 1e30]; None takes the method's default, and is replaced by it.
        batch_size: samples in the global batch, split over the replicas. The last, smaller batch of an epoch is
            dropped; every epoch shuffles anew.
        seed: of the initial parameters and the order of the data, in 0 … 2³² − 1.
        activation: of the reference network.
        train_limit: number of training samples, the first ones; None for all.
        topology: where the replicas live: in this process, or over several ("tree", "server").
        servers: S, the processes that are servers; 0 where there are none.

    Raises:
        RunError: if a setting is out of range.
    """

    dataset: str
    method: str
    replicas: int = 1
    epochs: int = 10
    learning_rate: float | None = None
    batch_size: int = 256
    seed: int = 0
    activation: Activation = "relu"
    train_limit: int | None = None
    topology: Kind = "simulated"
    servers: int = 0

    def __post_init__(self) -> None:
        _require(self.method in METHODS, f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("replicas", "epochs", "batch_size"):
            _require(getattr(self, name) >= 1, f"{name.replace('_', ' ')} must be >= 1, got {getattr(self, name)}")
        _require(0 <= self.seed <= MAX_SEED, f"seed must be in 0 … {MAX_SEED}, got {self.seed}")
        _require(
            self.batch_size % self.replicas == 0,
            f"replicas must divide the batch size {self.batch_size}, got {self.replicas}",
        )
        _require(
            self.topology in get_args(Kind),
            f"topology must be one of {', '.join(get_args(Kind))}, got {self.topology!r}",
        )
        _require(
            self.topology in METHODS[self.method].topologies,
            f"topology must be {' or '.join(METHODS[self.method].topologies)} for method {self.method}, "
            f"got {self.topology}",
        )
        _require(
            self.servers >= 1 if self.topology == "server" else self.servers == 0,
            f"servers must be {'>= 1' if self.topology == 'server' else '0'} for topology {self.topology}, "
            f"got {self.servers}",
        )
        activations = get_args(Activation)
        _require(
            self.activation in activations,
            f"activation must be one of {', '.join(activations)}, got {self.activation!r}",
        )
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", METHODS[self.method].learning_rate)
        rate = self.learning_rate or 0.0
        _require(
            0.0 < rate <= MAX_RATE, f"learning rate must be positive and at most {MAX_RATE:g}, got {self.learning_rate}"
        )

    @property
    def label(self) -> str:
        """The run in a few words."""
        several = METHODS[self.method].parts_replicas or self.topology != "simulated"
        replicas = f", M = {self.replicas}" if several else ""
        topology = "" if self.topology == "simulated" else f", {self.topology}"
        return f"{self.method}{replicas}, rate {self.learning_rate:g}, seed {self.seed}{topology}"

    @property
    def processes(self) -> int:
        """How many processes the run takes."""
        return 1 if self.topology == "simulated" else self.replicas + self.servers

    def check_fits(self, train_samples: int) -> None:
        """Check that an epoch holds at least one batch.

        Args:
            train_samples: size of the training set.

        Raises:
            RunError: if it does not.
        """
        _require(
            self.batch_size <= train_samples,
            f"batch size must be at most the {train_samples} training samples, got {self.batch_size}",
        )


@dataclass(frozen=True)
class Epoch:
    """What a run had reached after one epoch; counts and seconds from the start of the run.

    Attributes:
        epoch: number of finished epochs.
        train_loss: mean loss of the epoch's batches as they were trained on.
        train_nll: negative log-likelihood, mean over the whole training set; nan if the run diverged.
        test_accuracy: fraction of the test set classified correctly.
        gradient_evaluations: samples whose gradient was computed, secant evaluations included.
        seconds: time of training, without the evaluation after each epoch.
        sharpness: largest Ritz value of the last secants on common data, None where there are none.
        sharpness_residual: its residual; a sharpness below it is noise.
        fallbacks: steps replaced by SGD steps because they did not descend; None for methods without.
    """

    epoch: int
    train_loss: float
    train_nll: float
    test_accuracy: float
    gradient_evaluations: int
    seconds: float
    sharpness: float | None = None
    sharpness_residual: float | None = None
    fallbacks: int | None = None


@dataclass(frozen=True)
class Progress:
    """How far an epoch has come that a run was told to leave.

    Attributes:
        steps: steps taken.
        loss: sum of their losses.
        gradient_evaluations: samples whose gradient was computed in them.
        seconds: time they took.
    """

    steps: int = 0
    loss: float = 0.0
    gradient_evaluations: int = 0
    seconds: float = 0.0


@dataclass
class RunState:
    """A run as far as it has come, as one of its processes knows it.

    Attributes:
        config: its settings.
        history: one entry a finished epoch; a server has none.
        progress: in the epoch after these.
        model: `state_dict` of the network.
        optimizer: `state_dict` of the optimizer.
        random_state: torch's global random state on the CPU.
    """

    config: RunConfig
    history: list[Epoch] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    random_state: torch.Tensor | None = None

    @property
    def diverged(self) -> bool:
        """Whether the last training NLL is not finite; such a run goes no further."""
        return bool(self.history) and not math.isfinite(self.history[-1].train_nll)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.diverged or len(self.history) >= self.config.epochs

    def continued(self, config: RunConfig) -> "RunState":
        """The same run, to be continued with settings that may ask for another number of epochs.

        Args:
            config: settings asked for.

        Returns:
            The run with these settings.

        Raises:
            RunError: if they differ in anything else.
        """
        for name, value in asdict(replace(self.config, epochs=config.epochs)).items():
            asked = getattr(config, name)
            _require(value == asked, f"the saved run has {name.replace('_', ' ')} {value}, got {asked}")
        return replace(self, config=config)

    def summary(self, epochs: int) -> dict[str, Any]:
        """Entry of `summary.json`: settings, and lists with one value an epoch.

        Args:
            epochs: how many epochs to tell of, at most.

        Returns:
            The entry; None stands for nan.
        """
        entry = {name: getattr(self.config, name) for name in ("method", "replicas", "seed", "learning_rate")}
        quantities = ("train_nll", "test_accuracy", "gradient_evaluations", "seconds")
        return entry | {
            name: [finite_or_none(getattr(epoch, name)) for epoch in self.history[:epochs]] for name in quantities
        }


def save_run(state: RunState, folder: Path, topology: Topology | None = None, *, steps: int = 0) -> None:
    """Write a checkpoint and `metrics.jsonl` of a run, each whole or not at all.

    Args:
        state: the run after an epoch, or as it leaves one; each process has its own.
        folder: where the files go.
        topology: of the processes, which all call this; None for one alone. The metrics are those of the first worker.
        steps: of training so far.
    """
    topology = topology or Simulated(1)
    content = {
        "config": asdict(state.config),
        "history": [asdict(epoch) for epoch in state.history],
        "progress": asdict(state.progress),
        "model": state.model,
        "optimizer": state.optimizer,
        "random_state": state.random_state,
    }
    # The checkpoint comes last: it decides what a resumed run knows, so a finished run never lacks a line of metrics.
    if topology.position == topology.layout.first_worker:
        lines = (
            json.dumps({name: finite_or_none(value) for name, value in asdict(epoch).items()}) + "\n"
            for epoch in state.history
        )
        replace_file(folder / METRICS, "".join(lines).encode())
    write_checkpoint(folder / CHECKPOINTS, steps, content, topology)


def load_run(folder: Path, topology: Topology | None = None) -> RunState | None:
    """The run saved in a folder, from its newest checkpoint that is whole.

    Args:
        folder: where `save_run` wrote.
        topology: of the processes, which all call this; None for one alone.

    Returns:
        The run as this process knew it, or the first worker if other processes saved it; None if the folder holds none.

    Raises:
        RunError: if there is a checkpoint, and none that can be read.
    """
    topology = topology or Simulated(1)
    try:
        saved = newest_checkpoint(folder / CHECKPOINTS, topology)
    except CheckpointError as error:
        raise RunError(str(error)) from error
    if saved is None:
        return None
    try:
        content = saved.content(topology.position if saved.layout == topology.layout else saved.layout.first_worker)
        config = RunConfig(**content.pop("config"))
        history = [Epoch(**epoch) for epoch in content.pop("history")]
        return RunState(config, history, Progress(**content.pop("progress")), **content)
    except Exception as error:  # whatever is wrong with a file that somebody else has written
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"{saved.path}: not a readable checkpoint ({reason}); delete {folder} to train from the start"
        ) from error


def finite_or_none(value: Any) -> Any:
    """A value for JSON, which has no nan and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise RunError(rule)


def number_or_nan(value: float | None) -> float:
    """A value from JSON: what `finite_or_none` made of nan is nan again.

    Args:
        value: A number or None.

    Returns:
        The number, or nan.
    """
    return math.nan if value is None else value
