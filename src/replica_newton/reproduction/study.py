"""Running the study: several runs at a time, each in a process of its own, kept in one file that grows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from replica_newton.reproduction.experiment import Experiment, Record, run_experiment, scaled_dataset
from replica_newton.reproduction.mechanism import measure_mechanism
from replica_newton.reproduction.optimal_rate import measure_optimal_rate
from replica_newton.reproduction.plan import PANELS, Plan
from replica_newton.reproduction.readings import reading_named
from replica_newton.reproduction.results import Measurement, Request, Results, load_results, save_results
from replica_newton.reproduction.surface_methods import compare_surfaces
from replica_newton.reproduction.trainers import TRAINERS
from replica_newton.runner import JobObserver, Runner, Tell

Task = Request | Measurement
_GUESSED_EPOCH = 5.0
_GUESSED_MEASUREMENT = 150.0


@dataclass
class Study:
    """A study in progress.

    Attributes:
        plan: which runs.
        data: where each data set's files are; None searches as `load_dataset` does.
        summary: file of the results.
        checkpoints: folder of unfinished runs.
        workers: processes at a time, each with one thread.
    """

    plan: Plan
    data: dict[str, Path | None]
    summary: Path
    checkpoints: Path
    workers: int

    def missing(self, results: Results) -> list[Task]:
        """What is planned and not there yet.

        Args:
            results: what is known.

        Returns:
            Measurements, which wait for nothing, and requests, those first that others wait for; an experiment may be
            asked for several times, with different lengths.
        """
        measurements = [one for one in self.plan.measurements() if one.name not in results.measurements]
        requests = self.plan.requests(results)
        return [*measurements, *(one for one in requests if results.get(one.experiment, one.epochs) is None)]

    def presentable(self, results: Results) -> bool:
        """Whether the page can be written: all is there but, perhaps, some panels of one figure.

        Args:
            results: what is known.

        Returns:
            The answer.
        """
        return all(isinstance(task, Request) and task.stage == PANELS for task in self.missing(results))

    def run(self, observer: JobObserver[Task]) -> Results:
        """Run what is missing; the summary is written whenever a run is finished.

        Args:
            observer: is told of the progress.

        Returns:
            All results.

        Raises:
            RunError: if the summary cannot be read, or a process of the study dies.
        """
        results = load_results(self.summary)

        def keep(task: Task, outcome: Any) -> None:
            results.add(task, outcome)
            save_results(self.summary, results)

        self.checkpoints.mkdir(parents=True, exist_ok=True)
        Runner[Task](
            missing=lambda: self.missing(results),
            work=partial(_work, self.data, self.checkpoints),
            keep=keep,
            seconds=lambda: _seconds_per_epoch(results),
            workers=self.workers,
        ).run(observer)
        return results


def _work(data: dict[str, Path | None], checkpoints: Path, task: Task, tell: Tell) -> Record | dict[str, Any]:
    if isinstance(task, Measurement):
        return _measure(task, data, tell)
    experiment = task.experiment
    dataset = scaled_dataset(
        experiment.dataset, data.get(experiment.dataset), experiment.scaling, experiment.train_limit
    )
    return run_experiment(experiment, task.epochs, dataset, checkpoints, tell)


def _measure(task: Measurement, data: dict[str, Path | None], tell: Tell) -> dict[str, Any]:
    if task.quantity == "surfaces":
        return compare_surfaces()
    dataset = scaled_dataset(task.dataset, data.get(task.dataset), "standard", task.train_limit)
    measure = measure_mechanism if task.quantity == "mechanism" else measure_optimal_rate
    return measure(
        dataset, activation=task.activation, quick=task.train_limit is not None, tell=lambda _, fraction: tell(fraction)
    )


def _seconds_per_epoch(results: Results) -> Callable[[Task], float]:
    """Seconds of an epoch, from the runs of the same kind, or else a guess; a measurement has one epoch."""
    by_kind: dict[tuple[str, int], list[float]] = {}
    for record in results.records.values():
        if len(record.train_nll) and not record.diverged:
            by_kind.setdefault(_kind(record.experiment), []).append(record.seconds / len(record.train_nll))
    medians = {kind: median(values) for kind, values in by_kind.items()}
    guess = median(medians.values()) if medians else _GUESSED_EPOCH

    def seconds(task: Task) -> float:
        return _GUESSED_MEASUREMENT if isinstance(task, Measurement) else medians.get(_kind(task.experiment), guess)

    return seconds


def _kind(experiment: Experiment) -> tuple[str, int]:
    """Runs of one kind take about the same time: by data set and gradients a sample, 0 for a plain optimizer."""
    if experiment.method in TRAINERS:
        return experiment.dataset, 0
    return experiment.dataset, 2 if reading_named(experiment.method).data == "common" else 1
