"""Running the study: several runs at a time, each in a process of its own, kept in one file that grows."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from replica_newton.reproduction.experiment import Experiment, Record, run_experiment, scaled_dataset
from replica_newton.reproduction.mechanism import measure_mechanism
from replica_newton.reproduction.optimal_rate import measure_optimal_rate
from replica_newton.reproduction.plan import PANELS, Plan
from replica_newton.reproduction.readings import reading_named
from replica_newton.reproduction.results import Measurement, Request, Results, load_results, save_results
from replica_newton.reproduction.surface_methods import compare_surfaces
from replica_newton.reproduction.trainers import TRAINERS
from replica_newton.training.run import RunError

Task = Request | Measurement
# glibc gives freed memory back and takes it again at every step, a quarter of a step's time, unless told otherwise.
_ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "100000000",
}
_GUESSED_EPOCH = 5.0
_GUESSED_MEASUREMENT = 150.0
_REFRESH = 0.5


class StudyObserver(Protocol):
    """What the study tells as it goes."""

    def update(self, done: float, total: float, running: list[tuple[str, float, int]]) -> None:
        """Where it stands: seconds of work done and in all (estimated); label, epochs and epochs in all of each run."""

    def finish(self, task: Task, record: Record | None) -> None:
        """A run or a measurement is finished."""


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

    def run(self, observer: StudyObserver) -> Results:
        """Run what is missing; the summary is written whenever a run is finished.

        Args:
            observer: is told of the progress.

        Returns:
            All results.

        Raises:
            RunError: if the summary cannot be read, or a process of the study dies.
        """
        results = load_results(self.summary)
        done = 0.0
        with self._pool() as (submit, progress):
            running: dict[Future[Any], Task] = {}
            while True:
                missing = self.missing(results)
                for task in missing:
                    busy = {one.key for one in running.values()}
                    if len(running) < self.workers and not task.tentative and task.key not in busy:
                        running[submit(task)] = task
                if not running:
                    return results
                left = {task.key: task for task in sorted(missing, key=lambda one: one.epochs)}
                seconds = _seconds_per_epoch(results)
                finished: set[Future[Any]] = set()
                while not finished:
                    finished, _ = wait(running, timeout=_REFRESH, return_when=FIRST_COMPLETED)
                    now = [(task, float(progress.get(task.key, 0.0))) for task in running.values()]
                    partly = sum(seconds(task) * epochs for task, epochs in now)
                    total = done + sum(seconds(task) * task.epochs for task in left.values())
                    observer.update(done + partly, total, [(task.label, epochs, task.epochs) for task, epochs in now])
                for future in finished:
                    task = running.pop(future)
                    try:
                        outcome = future.result()
                    except BrokenProcessPool as error:
                        raise RunError(
                            f"a process of the study has died (killed, or out of memory) during {task.label}: "
                            "the same command goes on"
                        ) from error
                    done += seconds(task) * task.epochs
                    results.add(task, outcome)
                    save_results(self.summary, results)
                    observer.finish(task, outcome if isinstance(outcome, Record) else None)

    @contextmanager
    def _pool(self) -> Iterator[tuple[Callable[[Task], Future[Any]], Any]]:
        """Processes that work on tasks, and by key how many epochs each task has done."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        context = get_context("spawn")
        before = {name: os.environ.get(name) for name in _ALLOCATOR}
        os.environ.update(_ALLOCATOR)
        with context.Manager() as manager:
            progress = manager.dict()
            pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=(progress,))
            try:
                yield lambda task: pool.submit(_work, task, self.data, self.checkpoints), progress
            finally:
                # What is under way is given up: every run has its last epoch in a checkpoint.
                for process in list(pool._processes.values()):
                    process.terminate()
                pool.shutdown(wait=True, cancel_futures=True)
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})


_progress: Any = None


def _start_worker(progress: Any) -> None:
    global _progress
    _progress = progress
    torch.set_num_threads(1)


def _work(task: Task, data: dict[str, Path | None], checkpoints: Path) -> Record | dict[str, Any]:
    told = 0.0

    def tell(epochs: float) -> None:
        nonlocal told
        if time.monotonic() > told + 1.0:
            told = time.monotonic()
            _progress[task.key] = epochs

    if isinstance(task, Measurement):
        return _measure(task, data, tell)
    experiment = task.experiment
    dataset = scaled_dataset(
        experiment.dataset, data.get(experiment.dataset), experiment.scaling, experiment.train_limit
    )
    return run_experiment(experiment, task.epochs, dataset, checkpoints, tell)


def _measure(task: Measurement, data: dict[str, Path | None], tell: Callable[[float], None]) -> dict[str, Any]:
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
