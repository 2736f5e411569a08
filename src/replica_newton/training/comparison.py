"""A comparison: runs of one task that differ by method, replicas, rate and seed, kept in one folder."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from replica_newton.files import replace_file
from replica_newton.training.datasets import Dataset
from replica_newton.training.loop import Observer, train
from replica_newton.training.methods import METHODS
from replica_newton.training.models import reference_convnet
from replica_newton.training.run import RunConfig, RunError, RunState, check_places, load_run

RUNS = "runs"
SUMMARY = "summary.json"


def plan(
    base: RunConfig,
    methods: Sequence[str],
    replicas: Sequence[int],
    rates: Sequence[float | None],
    seeds: Sequence[int],
) -> list[RunConfig]:
    """The runs of a comparison: every method with every M, rate and seed.

    Methods whose replicas all stand at the same parameters (SGD, momentum, Adam) do the same whatever M is, and are
    planned once, with M = 1.

    Args:
        base: settings that all runs share.
        methods: names in `METHODS`.
        replicas: numbers of replicas M.
        rates: learning rates; None stands for the method's default.
        seeds: seeds.

    Returns:
        Settings of the runs, seeds outermost, so that an interrupted comparison is complete for some seeds.

    Raises:
        RunError: if a list is empty, or a setting is out of range for any run.
    """
    for name, values in (("methods", methods), ("replicas", replicas), ("learning rates", rates), ("seeds", seeds)):
        if not values:
            raise RunError(f"{name} must name at least one, got none")
    planned = [
        replace(base, method=method, replicas=M, learning_rate=rate, seed=seed)
        for seed, method, M, rate in product(seeds, methods, replicas, rates)
    ]
    return list(
        dict.fromkeys(one if METHODS[one.method].parts_replicas else replace(one, replicas=1) for one in planned)
    )


@dataclass
class Comparison:
    """Runs of one task in a folder.

    Attributes:
        folder: `runs/` holds a folder for each run, `summary.json` what they reached.
        task: what the runs have in common, as in `summary.json`.
    """

    folder: Path
    task: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, base: RunConfig, dataset: Dataset) -> "Comparison":
        """Comparison in a folder, new or continued; nothing is written yet.

        Args:
            folder: may exist, with runs of the same task.
            base: settings that all runs share.
            dataset: the data.

        Returns:
            The comparison.

        Raises:
            RunError: if the folder is a file, holds another task, or a batch does not fit the data.
        """
        base.check_fits(len(dataset.train_labels))
        model = reference_convnet(dataset.input_shape, dataset.classes, activation=base.activation)
        task = {
            "dataset": dataset.name,
            "train_samples": len(dataset.train_labels),
            "test_samples": len(dataset.test_labels),
            "activation": base.activation,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "batch_size": base.batch_size,
            "epochs": base.epochs,
        }
        before = _read_task(folder)
        for name, value in before.items():
            if name != "epochs" and task.get(name, value) != value:
                raise RunError(
                    f"{folder} holds runs with {name} {value}, got {task[name]}: choose another folder for another task"
                )
        return cls(folder, task)

    def run(self, planned: Iterable[RunConfig], dataset: Dataset, observer: Observer) -> None:
        """Train what is missing of the planned runs; the summary is written after every run.

        A finished run is kept, one that stopped early (or was planned with fewer epochs) goes on.

        Args:
            planned: settings of the runs.
            dataset: the data.
            observer: is told of every step and epoch.

        Raises:
            RunError: if a run's checkpoint cannot be read.
        """
        for config in planned:
            state = self._state(config)
            if state.finished:
                continue
            try:
                train(state, dataset, self._run_folder(config), observer)
            finally:
                self.write_summary()

    def missing(self, planned: Iterable[RunConfig]) -> int:
        """Number of planned runs that are not finished.

        Args:
            planned: settings of the runs.

        Returns:
            How many of them `run` would train.

        Raises:
            RunError: if a run's checkpoint cannot be read.
        """
        return sum(not self._state(config).finished for config in planned)

    def write_summary(self) -> dict[str, Any]:
        """Write `summary.json` from all runs in the folder, finished or not.

        Returns:
            Its content: `{"task": {...}, "runs": [{"method", "replicas", "seed", "learning_rate", "train_nll",
            "test_accuracy", "gradient_evaluations", "seconds"}]}`, the last four lists with one value an epoch;
            gradient evaluations (in samples) and seconds count from the start of the run. None stands for nan.
        """
        states = [load_run(folder) for folder in sorted((self.folder / RUNS).glob("*"))]
        entries = [state.summary(self.task["epochs"]) for state in states if state is not None]
        entries.sort(
            key=lambda run: (list(METHODS).index(run["method"]), run["replicas"], run["learning_rate"], run["seed"])
        )
        summary = {"task": self.task, "runs": entries}
        replace_file(self.folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
        return summary

    def _state(self, config: RunConfig) -> RunState:
        """The run as far as it has come."""
        state = load_run(self._run_folder(config))
        return RunState(config) if state is None else state.continued(config)

    def _run_folder(self, config: RunConfig) -> Path:
        name = f"{config.method}-M{config.replicas}-rate{config.learning_rate:g}-seed{config.seed}"
        return self.folder / RUNS / name


def _read_task(folder: Path) -> dict[str, Any]:
    """The task of the runs in a folder; empty where there are none."""
    check_places(folder)
    path = folder / SUMMARY
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_bytes())["task"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(
            f"{path}: not a readable summary ({error}); delete it, it is written anew from the runs"
        ) from error
