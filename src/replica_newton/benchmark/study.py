"""Running the benchmark: several runs at a time, each in a process of its own, kept in one file that grows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from replica_newton.benchmark.plan import Plan
from replica_newton.benchmark.results import Records, as_kept, load_records, save_records
from replica_newton.benchmark.run import Record, Run, do_run
from replica_newton.benchmark.tasks import TASKS
from replica_newton.report.formats import format_nll
from replica_newton.runner import JobObserver, Runner, Tell

_GUESSED_EPOCH = 5.0


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in progress. A run is short, so one that is interrupted starts anew; finished ones are kept.

    Attributes:
        plan: which runs.
        data: file or folder of the image data; None searches as `load_dataset` does.
        summary: file of the results.
        workers: processes at a time, each with one thread.
    """

    plan: Plan
    data: Path | None
    summary: Path
    workers: int

    def missing(self, records: Records) -> list[Run]:
        """What is planned and not there yet.

        Args:
            records: what is known.

        Returns:
            The runs.
        """
        return [run for run in self.plan.runs(records) if run not in records]

    def run(self, observer: JobObserver[Run]) -> Records:
        """Run what is missing; the summary is written whenever a run is finished.

        Args:
            observer: is told of the progress.

        Returns:
            All records.

        Raises:
            RunError: if the summary cannot be read, or a process dies.
        """
        records = load_records(self.summary)

        def keep(run: Run, record: Record) -> None:
            records[run] = as_kept(record)
            save_records(self.summary, records)

        Runner[Run](
            missing=lambda: self.missing(records),
            work=partial(_work, self.data),
            keep=keep,
            seconds=lambda: _seconds_per_epoch(records),
            workers=self.workers,
        ).run(observer)
        return records


def describe(run: Run, record: Any) -> str:  # noqa: ARG001
    """Outcome of a run in a few words.

    Args:
        run: what is finished.
        record: what it reached.

    Returns:
        For example "NLL 0.05 in 21 s".
    """
    if record.diverged:
        return f"diverged in step {record.steps}"
    return f"NLL {format_nll(record.final_nll)} in {record.seconds:.0f} s"


def _work(data: Path | None, run: Run, tell: Tell) -> Record:
    return do_run(run, TASKS[run.task].read(data, run.train_limit), tell)


def _seconds_per_epoch(records: Records) -> Callable[[Run], float]:
    """Seconds of an epoch of the budget, from runs of the same task and method, or else of the same task."""
    by_pair: dict[tuple[str, str], list[float]] = {}
    by_task: dict[str, list[float]] = {}
    for run, record in records.items():
        if not record.diverged:
            by_pair.setdefault((run.task, run.method), []).append(record.seconds / run.epochs)
            by_task.setdefault(run.task, []).append(record.seconds / run.epochs)
    pairs = {key: median(values) for key, values in by_pair.items()}
    tasks = {key: median(values) for key, values in by_task.items()}
    return lambda run: pairs.get((run.task, run.method), tasks.get(run.task, _GUESSED_EPOCH))
