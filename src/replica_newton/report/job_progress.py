"""Live progress of many jobs in the terminal; one plain line a finished job where there is no terminal."""

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from rich.console import Console, Group, RenderableType
from rich.text import Text

from replica_newton.report.live import LiveDisplay
from replica_newton.report.progress import bar_line, time_left
from replica_newton.runner import Job

JobT = TypeVar("JobT", bound=Job)
_REFRESH_PER_SECOND = 2


class JobProgress(LiveDisplay, Generic[JobT]):
    """Display of what a `Runner` does, as a context manager: a bar with the time left, and the jobs under way.

    The time left is that of the work left, as far as it is settled which jobs are needed, at the speed so far.

    Args:
        console: where to show it.
        title: what the jobs are together, at most 15 characters.
        describe: the outcome of a finished job in a few words.
    """

    def __init__(self, console: Console, title: str, describe: Callable[[JobT, Any], str]) -> None:
        self._title = title
        self._describe = describe
        self._started = time.monotonic()
        self._done, self._total = 0.0, 0.0
        self._running: list[tuple[str, float, int]] = []
        super().__init__(console, _REFRESH_PER_SECOND)

    def update(self, done: float, total: float, running: list[tuple[str, float, int]]) -> None:
        """See `JobObserver`.

        Args:
            done: seconds of work done since the start.
            total: seconds of work done and left.
            running: label, epochs and epochs in all of the jobs under way.
        """
        self._done, self._total, self._running = done, total, running

    def finish(self, job: JobT, outcome: Any) -> None:
        """See `JobObserver`.

        Args:
            job: what is finished.
            outcome: what it has brought.
        """
        line = f"{job.label}: {self._describe(job, outcome)}; {self._left()}"
        # Brackets would be markup.
        self._console.print(Text(line), soft_wrap=True, highlight=False)

    def _left(self) -> str:
        return time_left(time.monotonic() - self._started, self._done, 0.0, self._total)

    def _render(self) -> Group:
        share = self._done / self._total if self._total else 0.0
        lines: list[RenderableType] = [bar_line(self._title, share, self._left())]
        for label, epochs, of in self._running:
            lines.append(Text(label, no_wrap=True, overflow="ellipsis"))
            lines.append(bar_line(f"  {epochs:.1f}/{of} epochs", epochs / of, ""))
        return Group(*lines)
