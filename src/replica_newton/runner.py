"""Jobs that ask for further jobs, several at a time: a process for each, one thread a process."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from multiprocessing.managers import SyncManager
from threading import Thread
from typing import Any, Generic, Protocol, TypeVar

import torch

from replica_newton.training.run import RunError

Tell = Callable[[float], None]
"""Is told how much of a job is done, in the unit of its `epochs`."""

# glibc gives freed memory back and takes it again at every step, a quarter of a step's time, unless told otherwise.
_ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "100000000",
}
_REFRESH = 0.5


class Job(Protocol):
    """Something to run; it is sent to another process."""

    @property
    def key(self) -> str:
        """One word; jobs of one key are never run at the same time."""
        ...

    @property
    def label(self) -> str:
        """What a person reads."""
        ...

    @property
    def epochs(self) -> int:
        """Its length, in the unit in which it tells its progress."""
        ...

    @property
    def tentative(self) -> bool:
        """Whether it stands in for a choice that has still to be made, and is only counted."""
        ...


JobT = TypeVar("JobT", bound=Job)
_Seen = TypeVar("_Seen", contravariant=True)


class JobObserver(Protocol[_Seen]):
    """What is told while jobs are run."""

    def update(self, done: float, total: float, running: list[tuple[str, float, int]]) -> None:
        """Where it stands: seconds of work done and in all (estimated); label, epochs and epochs in all of each job."""

    def finish(self, job: _Seen, outcome: Any) -> None:
        """A job is finished, and its outcome kept."""


@dataclass(frozen=True)
class Runner(Generic[JobT]):
    """Runs what is missing until nothing is.

    Attributes:
        missing: what is left to run, those first that others wait for; asked anew whenever a job is finished.
        work: does a job, in another process: a function of a module, or a `functools.partial` of one.
        keep: takes in a job's outcome.
        seconds: what an epoch of a job takes, as far as known: a function that is asked for anew with `missing`.
        workers: processes at a time, each with one thread.
    """

    missing: Callable[[], Sequence[JobT]]
    work: Callable[[JobT, Tell], Any]
    keep: Callable[[JobT, Any], None]
    seconds: Callable[[], Callable[[JobT], float]]
    workers: int

    def run(self, observer: JobObserver[JobT]) -> None:
        """Run what is missing.

        Args:
            observer: is told of the progress.

        Raises:
            RunError: if a process dies. Errors of jobs reach the caller as they are.
        """
        done = 0.0
        with self._pool() as (submit, progress):
            running: dict[Future[Any], JobT] = {}
            while True:
                missing = self.missing()
                for job in missing:
                    busy = {one.key for one in running.values()}
                    if len(running) < self.workers and not job.tentative and job.key not in busy:
                        running[submit(job)] = job
                if not running:
                    return
                left = {job.key: job for job in sorted(missing, key=lambda one: one.epochs)}
                seconds = self.seconds()
                finished: set[Future[Any]] = set()
                while not finished:
                    finished, _ = wait(running, timeout=_REFRESH, return_when=FIRST_COMPLETED)
                    now = [(job, float(progress.get(job.key, 0.0))) for job in running.values()]
                    partly = sum(seconds(job) * epochs for job, epochs in now)
                    total = done + sum(seconds(job) * job.epochs for job in left.values())
                    observer.update(done + partly, total, [(job.label, epochs, job.epochs) for job, epochs in now])
                for future in finished:
                    job = running.pop(future)
                    try:
                        outcome = future.result()
                    except BrokenProcessPool as error:
                        raise RunError(
                            f"a process of the study has died (killed, or out of memory) during {job.label}: "
                            "the same command goes on"
                        ) from error
                    done += seconds(job) * job.epochs
                    self.keep(job, outcome)
                    observer.finish(job, outcome)

    @contextmanager
    def _pool(self) -> Iterator[tuple[Callable[[JobT], Future[Any]], Any]]:
        """Processes that work on jobs, and by key how many epochs each job has done."""
        context = get_context("spawn")
        before = {name: os.environ.get(name) for name in _ALLOCATOR}
        os.environ.update(_ALLOCATOR)
        manager = SyncManager(ctx=context)
        manager.start(_end_with_parent)
        with manager:
            progress = manager.dict()
            pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=(progress,))
            try:
                yield lambda job: pool.submit(_do, self.work, job), progress
            finally:
                # What is under way is given up.
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
    _end_with_parent()


def _end_with_parent() -> None:
    """From now on this process ends when its parent does: one that is killed cannot end it, and jobs would run on."""
    Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    parent = parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _do(work: Callable[[JobT, Tell], Any], job: JobT) -> Any:
    told = 0.0

    def tell(epochs: float) -> None:
        nonlocal told
        if time.monotonic() > told + 1.0:
            told = time.monotonic()
            _progress[job.key] = epochs

    return work(job, tell)
