import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import Square, square

from replica_newton.runner import Runner
from replica_newton.training.run import RunError


class Observer:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.finished: list[Any] = []
        self.shares: list[float] = []

    def update(self, done: float, total: float, running: list[tuple[str, float, int]]) -> None:
        """Remember the share that is done."""
        assert all(0.0 <= epochs <= of for _, epochs, of in running)
        self.shares.append(done / total)

    def finish(self, job: Square, outcome: Any) -> None:
        """Remember the outcome."""
        self.finished.append((job.number, outcome))


def runner(results: dict[int, int]) -> Runner[Square]:
    """Squares 2, then what comes of it twice; a tentative job stands for what is not known yet."""

    def missing() -> list[Square]:
        asked = [Square(2)]
        for _ in range(2):
            last = results.get(asked[-1].number)
            asked.append(Square(last) if last is not None else Square(-1, tentative=True))
        return [job for job in asked if job.number not in results]

    return Runner(missing, square, lambda job, outcome: results.update({job.number: outcome}), lambda: lambda _: 1.0, 2)


def test_jobs_may_ask_for_further_jobs() -> None:
    results: dict[int, int] = {}
    observer = Observer()
    runner(results).run(observer)
    assert results == {2: 4, 4: 16, 16: 256}
    assert observer.finished == [(2, 4), (4, 16), (16, 256)]
    assert observer.shares[0] < 0.9
    again = Observer()
    runner(results).run(again)
    assert again.finished == []


def test_a_process_that_dies_ends_it_with_the_name_of_the_job() -> None:
    jobs = Runner(lambda: [Square(13)], square, lambda *_: None, lambda: lambda _: 1.0, 1)
    with pytest.raises(RunError, match=r"has died .* during square of 13"):
        jobs.run(Observer())


def test_processes_end_with_a_parent_that_is_killed() -> None:
    command = [sys.executable, "-c", "from jobs import square_for_ever; square_for_ever()"]
    folder = Path(__file__).parent
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        try:
            for _ in range(2):
                assert parent.stdout.readline() == "at work\n"
            parent.kill()
            # Its output ends with the last process that holds it: none is left then.
            assert parent.communicate(timeout=60.0)[0] == ""
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
