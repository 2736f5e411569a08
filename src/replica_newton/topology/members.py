"""Calls of a topology whose members never change: what a lost one ends, it ends for all."""

from collections.abc import Callable

from torch import Tensor


class LastingMembers:
    """The part of `Topology` that is about members who come and go, where none do.

    Attributes:
        replicas: M.
        steps: steps asked for so far, taken or given up.
    """

    replicas: int
    steps = 0

    def together(self, call: Callable[[], bool], meet: Callable[[], None]) -> None:  # noqa: ARG002
        """Make a call that all processes make; see `Topology`."""
        call()

    def prepared(self, undo: Callable[[], None] | None = None, *, stepped: bool = False) -> None:  # noqa: ARG002
        """Count a step that will be taken, or has been given up; see `Topology`."""
        self.steps += stepped

    def all_prepared(self) -> None:
        """Nothing is undone from here on: it never is; see `Topology`."""

    def end_together(
        self, finish: Callable[[], None], undo: Callable[[], None] | None = None, *, stepped: bool = False
    ) -> None:
        """End a call: who cannot go on ends the run for all; see `Topology`."""
        finish()
        self.prepared(undo, stepped=stepped)

    def said_by_server(self, message: Tensor) -> Tensor:
        """What the first holder of columns knows: here all know it; see `Topology`."""
        return message
