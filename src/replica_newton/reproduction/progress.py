"""Live progress of the study in the terminal; one plain line a finished run where there is no terminal."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from replica_newton.report.formats import format_nll
from replica_newton.report.progress import bar_line, time_left
from replica_newton.reproduction.experiment import Record
from replica_newton.reproduction.study import Task

_REFRESH_PER_SECOND = 2


class StudyProgress:
    """Display of a study, as a context manager: a bar with the time left, and the runs under way.

    The time left is that of the work left, as far as it is settled which runs are needed, at the speed so far.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._done, self._total = 0.0, 0.0
        self._running: list[tuple[str, float, int]] = []
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(
                console=console, get_renderable=self._render, refresh_per_second=_REFRESH_PER_SECOND, transient=True
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: float, total: float, running: list[tuple[str, float, int]]) -> None:
        """See `StudyObserver`.

        Args:
            done: seconds of work done since the start.
            total: seconds of work done and left.
            running: label, epochs and epochs in all of the runs under way.
        """
        self._done, self._total, self._running = done, total, running

    def finish(self, task: Task, record: Record | None) -> None:
        """See `StudyObserver`.

        Args:
            task: what is finished.
            record: what a run reached, None for a measurement.
        """
        if record is None:
            outcome = "measured"
        elif record.diverged:
            outcome = f"diverged in epoch {len(record.train_nll)}"
        else:
            outcome = f"NLL {format_nll(record.train_nll[-1])} after {len(record.train_nll)} epochs"
        # Brackets would be markup.
        self._console.print(Text(f"{task.label}: {outcome}; {self._left()}"), soft_wrap=True, highlight=False)

    def _left(self) -> str:
        return time_left(time.monotonic() - self._started, self._done, 0.0, self._total)

    def _render(self) -> Group:
        share = self._done / self._total if self._total else 0.0
        lines: list[RenderableType] = [bar_line("study", share, self._left())]
        for label, epochs, of in self._running:
            lines.append(Text(label, no_wrap=True, overflow="ellipsis"))
            lines.append(bar_line(f"  {epochs:.1f}/{of} epochs", epochs / of, ""))
        return Group(*lines)
