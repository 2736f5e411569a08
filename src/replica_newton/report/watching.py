"""Everything that looks on while a run trains: the monitor with its panel and file, and the trackers."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from replica_newton.monitor import CurvatureObservation
from replica_newton.report.curvature import load_curvature
from replica_newton.report.html import write_curvature_report
from replica_newton.report.panel import CurvaturePanel
from replica_newton.trackers import TRACKERS, JsonLinesTracker, Tracker, missing_package
from replica_newton.training.loop import Observer
from replica_newton.training.run import RunConfig, RunError
from replica_newton.training.watch import CurvatureWatch, TrackedRun, curvature_values, log_finite

CURVATURE = "curvature.jsonl"


class Watching(NamedTuple):
    """What looks on.

    Attributes:
        trackers: that are open.
        panel: for the terminal, None without a monitor.
        watch: for the loop, None without a monitor.
    """

    trackers: Sequence[Tracker]
    panel: CurvaturePanel | None
    watch: CurvatureWatch | None

    def observer(self, display: Observer) -> Observer:
        """The display, with the trackers and the panel behind it.

        Args:
            display: that is told of steps and epochs too.

        Returns:
            An observer for the loop.
        """
        return TrackedRun(display, self.trackers, None if self.panel is None else self.panel.loss)


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and are installed.

    Args:
        names: keys of `TRACKERS`.

    Raises:
        RunError: if one does not exist, is not installed, or is named twice.
    """
    for name in names:
        if name not in TRACKERS:
            raise RunError(f"tracker must be one of {', '.join(TRACKERS)}, got {name!r}")
        if name != "jsonl" and importlib.util.find_spec(name) is None:
            raise RunError(missing_package(name))
    if len(set(names)) < len(names):
        raise RunError(f"every tracker must be named once, got {', '.join(names)}")


@contextmanager
def watching(
    folder: Path, completed_steps: int, *, monitor: int | None, trackers: Sequence[str], speaks: bool = True
) -> Iterator[Watching]:
    """Open what looks on, and close it at the end.

    Args:
        folder: of the run.
        completed_steps: steps taken before.
        monitor: steps from one probe to the next, None for no monitor.
        trackers: names of those to log to.
        speaks: whether this process shows and writes what is seen; of several one does, and the others look on only
            because probes need all of them.

    Yields:
        What looks on.
    """
    with ExitStack() as stack:
        opened: list[Tracker] = [
            stack.enter_context(closing(TRACKERS[name](folder, folder.name, completed_steps))) for name in trackers
        ]
        if monitor is None:
            yield Watching(opened, None, None)
            return
        if not speaks:
            yield Watching(opened, None, CurvatureWatch(monitor, lambda *_: None))
            return
        lines = JsonLinesTracker(folder / CURVATURE, first_step=completed_steps)
        logs: list[Tracker] = [stack.enter_context(closing(lines)), *opened]
        panel = CurvaturePanel()

        def report(step: int, seen: CurvatureObservation) -> None:
            panel.observe(step, seen)
            log_finite(logs, step, curvature_values(seen))

        yield Watching(opened, panel, CurvatureWatch(monitor, report))


def report_curvature(config: RunConfig, folder: Path, environment: Mapping[str, str]) -> Path | None:
    """Draw what the monitor has seen of a run.

    Args:
        config: of the run.
        folder: of the run.
        environment: what the numbers were computed with.

    Returns:
        Path of the report; None if the monitor has seen nothing.
    """
    seen = load_curvature(folder / CURVATURE)
    return write_curvature_report(seen, asdict(config), folder, environment) if seen else None
