"""The curvature panel: loss, sharpness against the limit of stability, and the eigenvalues, for a live terminal."""

import math
from collections import deque

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from replica_newton.monitor import CurvatureObservation
from replica_newton.report.formats import MISSING

_HISTORY = 200
_BLOCKS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LABEL, _VALUE = 10, 9
_MARGIN = _LABEL + _VALUE + 6  # borders and padding too


class CurvaturePanel:
    """Renderable of rich that shows the newest observation, and the way there.

    Where the monitor knows the limit of stability of the optimizer, in its metric, curvature is drawn as a bar against
    it; ▏ is the limit.
    """

    def __init__(self) -> None:
        self._seen: CurvatureObservation | None = None
        self._step = 0
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._sharpness: deque[float] = deque(maxlen=_HISTORY)

    def loss(self, value: float) -> None:
        """A step was taken.

        Args:
            value: its loss.
        """
        self._losses.append(value)

    def observe(self, step: int, seen: CurvatureObservation) -> None:
        """The monitor saw something.

        Args:
            step: number of the step about to be taken, from 1.
            seen: what was seen.
        """
        self._step, self._seen = step, seen
        self._sharpness.append(seen.sharpness)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What the terminal shows now, as wide as there is room."""
        width = max(options.max_width - _MARGIN, 8)
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=_LABEL, no_wrap=True)
        grid.add_column(width=_VALUE, no_wrap=True, justify="right")
        grid.add_column(width=width, no_wrap=True)
        losses = list(self._losses)
        grid.add_row("loss", _number(losses[-1] if losses else math.nan), Text(_sparkline(losses, width)))
        sharpness = list(self._sharpness)
        newest = sharpness[-1] if sharpness else math.nan
        grid.add_row("sharpness", _number(newest), Text(_sparkline(sharpness, width)))
        if self._seen is not None and self._seen.stability_ratio is not None:
            ratio = self._seen.stability_ratio
            grid.add_row("of limit", f"{ratio:.0%}" if math.isfinite(ratio) else MISSING, _against_limit(ratio, width))
        for i, (value, error) in enumerate(self._pairs(), start=1):
            grid.add_row(f"θ{i}", _number(value), self._eigenvalue_bar(value, error, width))
        title = f"curvature at step {self._step}" if self._seen is not None else "curvature: no probe yet"
        yield Panel(grid, title=title, title_align="left", box=box.ROUNDED, padding=(0, 1), width=options.max_width)

    def _pairs(self) -> list[tuple[float, float]]:
        if self._seen is None:
            return []
        return list(zip(self._seen.eigenvalues.tolist(), self._seen.residuals.tolist(), strict=True))

    def _eigenvalue_bar(self, value: float, error: float, width: int) -> Text:
        """Length by magnitude, colour by sign; dim where the residual is larger than the value."""
        largest = max((abs(one) for one, _ in self._pairs() if math.isfinite(one)), default=0.0)
        bar = _bar(min(abs(value) / largest, 1.0) if largest > 0.0 and not math.isnan(value) else 0.0, width)
        colour = "cyan" if value >= 0.0 else "magenta"
        return Text(bar, style=f"dim {colour}" if error > abs(value) else colour)


def _against_limit(ratio: float, width: int) -> Text:
    """A bar whose right third lies beyond the limit."""
    place = 2 * width // 3
    share = ratio if math.isfinite(ratio) and ratio > 0.0 else 0.0
    bar = _bar(min(share * place / width, 1.0), width).ljust(width)
    colour = "red" if share > 1.0 else "yellow" if share > 0.8 else "green"
    text = Text(bar[:place], style=colour)
    text.append("▏" if bar[place] == " " else bar[place], style="bold")
    text.append(bar[place + 1 :], style=colour)
    return text


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else MISSING


def _bar(share: float, width: int) -> str:
    """A bar in eighths of a character."""
    whole, rest = divmod(round(max(share, 0.0) * width * 8), 8)
    return (_EIGHTHS[8] * whole + (_EIGHTHS[rest] if rest else ""))[:width]


def _sparkline(values: list[float], width: int) -> str:
    """The newest values, lowest to highest; a gap where a value is not finite."""
    shown = values[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BLOCKS) - 1
    return "".join(
        " " if not math.isfinite(value) else _BLOCKS[round(top * (value - low) / span) if span > 0.0 else 0]
        for value in shown
    )
