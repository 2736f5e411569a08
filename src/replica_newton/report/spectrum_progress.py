"""Live display of the search for eigenpairs: the sweeps so far, and a bar with the time left."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.text import Text

from replica_newton.report.live import LiveDisplay
from replica_newton.report.progress import bar_line, time_left
from replica_newton.report.spectrum import sweeps_table
from replica_newton.spectrum import Sweep

_REFRESH_PER_SECOND = 4


class SpectrumProgress(LiveDisplay):
    """Display of the sweeps, as a context manager.

    A terminal shows the table grow, with a bar below; anything else gets one line a sweep. How many sweeps are needed
    is not known before: the time left is that of all that are allowed.

    Args:
        console: where to show it.
        label: what is being looked at.
        top: eigenpairs asked for.
        sweeps: at most so many.
    """

    def __init__(self, console: Console, label: str, top: int, sweeps: int) -> None:
        self._label, self._top = label, top
        self._sweeps: list[Sweep] = []
        self._phase, self._total, self._done = "sweep", float(sweeps), 0.0
        self._started = time.monotonic()
        super().__init__(console, _REFRESH_PER_SECOND)

    def __enter__(self) -> Self:
        if self._live is None:
            self._print(self._label)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._live is not None and kind is None:
            self._print(self._label)
            self._console.print(sweeps_table(self._sweeps, self._top))

    def advance(self, share: float) -> None:
        """A batch was evaluated.

        Args:
            share: of a sweep, or of a step of the density.
        """
        self._done += share

    def finish_sweep(self, sweep: Sweep) -> None:
        """A sweep was finished.

        Args:
            sweep: what it reached.
        """
        self._sweeps.append(sweep)
        if self._live is None:
            self._print(
                f"sweep {sweep.sweep}: {sweep.gradients} gradients, sharpness {sweep.sharpness:.4g}, "
                f"residual {sweep.residual:.1e}, {sweep.converged}/{self._top} converged"
            )

    def start_density(self, products: int) -> None:
        """The pairs are there; the density begins.

        Args:
            products: that it takes.
        """
        self._phase, self._total, self._done = "density", float(products), 0.0
        self._started = time.monotonic()
        if self._live is None:
            self._print(f"density: {products} products")

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def _render(self) -> Group:
        """What the terminal shows now."""
        at_most = "≤ " if self._phase == "sweep" else ""
        left = at_most + time_left(time.monotonic() - self._started, self._done, 0.0, self._total)
        counter = f"{self._phase} {int(self._done) + 1}/{self._total:.0f}"
        return Group(
            Text(self._label, style="bold", no_wrap=True, overflow="ellipsis"),
            sweeps_table(self._sweeps, self._top),
            bar_line(counter, self._done / self._total, left),
        )
