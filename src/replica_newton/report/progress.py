"""Live progress of training in the terminal; one plain line an epoch where there is no terminal."""

import math
import time

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from replica_newton.report.formats import MISSING, format_nll, format_percent
from replica_newton.report.live import LiveDisplay

_REFRESH_PER_SECOND = 8


class TrainingProgress(LiveDisplay):
    """Display of one training run after the other, as a context manager.

    A terminal shows a bar with the newest numbers, drawn by a thread of rich eight times a second: a step only stores
    its numbers, which costs less than a microsecond. Anything else (a pipe, a log file) gets one line an epoch.

    Args:
        console: Where to show it; standard output when missing.
        enabled: Whether to show anything at all: `False` on all processes but the first.
        below: What a terminal shows below it.
    """

    def __init__(
        self, console: Console | None = None, *, enabled: bool = True, below: RenderableType | None = None
    ) -> None:
        self._below = below
        self._enabled = enabled
        self._label: str | None = None
        self._epochs = self._steps_per_epoch = self._steps = self._first_step = 0
        self._started = 0.0
        self._loss, self._sharpness, self._learning_rate = math.nan, math.nan, math.nan
        self._epoch = ""
        self._total_runs = self._completed_runs = self._first_run = 0
        self._runs_started = 0.0
        super().__init__(console or Console(), _REFRESH_PER_SECOND, enabled=enabled)

    def set_total_runs(self, total: int, completed: int = 0) -> None:
        """Outer bar over several runs.

        Args:
            total: Number of runs.
            completed: Number of runs that are finished already, for example before a restart.
        """
        self._total_runs, self._completed_runs, self._first_run = total, completed, completed
        self._runs_started = time.monotonic()

    def start_run(self, label: str, *, epochs: int, steps_per_epoch: int, completed_steps: int = 0) -> None:
        """Start of a run.

        Args:
            label: What is trained, in a few words.
            epochs: Number of epochs.
            steps_per_epoch: Number of optimiser steps in an epoch.
            completed_steps: Number of steps done already, for a run that is taken up again.
        """
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch
        self._steps = self._first_step = completed_steps
        self._started = time.monotonic()
        self._loss, self._sharpness, self._learning_rate = math.nan, math.nan, math.nan
        self._epoch = ""
        # Last, because the thread that draws shows a run as soon as it has a label.
        self._label = label

    def step(self, *, loss: float, sharpness: float | None, learning_rate: float | None) -> None:
        """One optimiser step.

        Args:
            loss: Training loss of the batch.
            sharpness: Largest eigenvalue of the Hessian matrix, if it is known.
            learning_rate: Learning rate of the step, if there is one.
        """
        self._steps += 1
        self._loss = loss
        self._sharpness = math.nan if sharpness is None else sharpness
        self._learning_rate = math.nan if learning_rate is None else learning_rate

    def finish_epoch(self, *, epoch: int, train_nll: float, test_accuracy: float) -> None:
        """End of an epoch.

        Args:
            epoch: Number of finished epochs.
            train_nll: Negative log-likelihood on the training set.
            test_accuracy: Fraction of the test set that is classified correctly.
        """
        self._epoch = f"epoch {epoch}/{self._epochs}: NLL {format_nll(train_nll)}, test {format_percent(test_accuracy)}"
        if self._live is None:
            self._print(self._epoch)

    def finish_run(self) -> None:
        """End of a run: a terminal keeps one line with its last epoch."""
        if self._live is not None:
            self._print(self._epoch or "no epoch finished")
        self._completed_runs += 1
        self._label = None

    def _print(self, text: str) -> None:
        """Print one line about the run, with its number if there are several."""
        if not self._enabled:
            return
        number = f"[{self._completed_runs + 1}/{self._total_runs}] " if self._total_runs else ""
        took = _duration(time.monotonic() - self._started)
        # Soft wrap and no markup: the line goes into a log as it is, whatever the width and the label.
        self._console.print(
            f"{number}{self._label}, {text}, {took}", soft_wrap=True, markup=False, highlight=False, emoji=False
        )

    def _render(self) -> Group:
        """What the terminal shows now."""
        now = time.monotonic()
        lines: list[RenderableType] = []
        fraction = 0.0
        label = self._label
        if label is not None:
            total = self._epochs * self._steps_per_epoch
            epoch = min(self._steps // max(self._steps_per_epoch, 1) + 1, self._epochs)
            fraction = self._steps / total if total else 1.0
            left = time_left(now - self._started, self._steps, self._first_step, total)
            lines.append(Text(label, style="bold", no_wrap=True, overflow="ellipsis"))
            lines.append(bar_line(f"  epoch {epoch}/{self._epochs}", fraction, left))
            lines.append(
                Text(
                    f"  loss {_short(self._loss)}   sharpness {_short(self._sharpness)}   "
                    f"rate {_short(self._learning_rate)}",
                    style="dim",
                )
            )
            if self._epoch:
                lines.append(Text(f"  {self._epoch}", style="dim", no_wrap=True, overflow="ellipsis"))
        if self._total_runs:
            done = self._completed_runs + fraction
            left = time_left(now - self._runs_started, done, self._first_run, self._total_runs)
            lines.append(bar_line(f"runs {self._completed_runs}/{self._total_runs}", done / self._total_runs, left))
        if self._below is not None:
            lines.append(self._below)
        # Narrower than the terminal, whose echo of ^C would otherwise wrap the last line and leave it behind.
        return Group(*(Constrain(line, self._console.width - 3) for line in lines))


def bar_line(counter: str, fraction: float, left: str) -> Table:
    """One line over the whole width.

    Args:
        counter: What is counted, at most 15 characters.
        fraction: Share that is done.
        left: Time left, in words.

    Returns:
        Counter, bar, percentage and time left.
    """
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True, width=15)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right", width=5)
    grid.add_column(no_wrap=True, justify="right", width=12)
    bar = ProgressBar(total=1.0, completed=min(fraction, 1.0))
    grid.add_row(counter, bar, f"{fraction:.0%}", left)
    return grid


def time_left(elapsed: float, done: float, first: float, total: float) -> str:
    """Time left at the mean pace since the start.

    Args:
        elapsed: Seconds since the start.
        done: Work that is done.
        first: Work that was done before the start, which does not count towards the pace.
        total: All of the work.

    Returns:
        For example `12:30 left`.
    """
    if done <= first:
        return f"{MISSING} left"
    return f"{_duration(elapsed * (total - done) / (done - first))} left"


def _duration(seconds: float) -> str:
    """Duration as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(value: float) -> str:
    """Number with four significant digits, or a dash when it is missing."""
    return MISSING if math.isnan(value) else f"{value:.4g}"
