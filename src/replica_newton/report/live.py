"""What every live display does: draw itself while it is entered, on terminals that can."""

from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live


class LiveDisplay:
    """Draws what `_render` gives, again and again, and leaves nothing behind.

    It may draw once when it is made, so what a subclass draws must be there before.

    Args:
        console: where to show it.
        refresh_per_second: how often.
        enabled: whether to draw at all.
    """

    def __init__(self, console: Console, refresh_per_second: float, *, enabled: bool = True) -> None:
        self._console = console
        self._live: Live | None = None
        if enabled and console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(
                console=console, get_renderable=self._render, refresh_per_second=refresh_per_second, transient=True
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

    def _render(self) -> RenderableType:
        raise NotImplementedError
