"""What an optimizer asks of a topology."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from replica_newton.topology.layout import Layout
from replica_newton.topology.simulated import Data, ReplicaGradients
from replica_newton.topology.standing import Standing


class Topology(Protocol):
    """Where M replicas live and how their vectors travel.

    N-sized work is shared by columns: a process holds n of the N columns of every row and of the shared parameters. In
    one process n = N and nothing travels. All processes must call the same methods in the same order.
    """

    @property
    def replicas(self) -> int:
        """M."""
        ...

    @property
    def layout(self) -> Layout:
        """Who is who among the processes."""
        ...

    @property
    def position(self) -> int:
        """Of this process among those of the layout, from 0."""
        ...

    @property
    def distributed(self) -> bool:
        """Whether the replicas live in processes of their own, each in a module that stands where it does."""
        ...

    def lay_out(self, parameters: Sequence[Tensor]) -> list[int]:
        """Fix which process holds which columns; returns what a state must agree with to be of the same columns."""
        ...

    @property
    def workers(self) -> list[int]:
        """M names of the replicas, which they keep when others come or go."""
        ...

    steps: int
    """Steps asked for so far, taken or given up."""

    def place(self, parameters: Sequence[Tensor], standing: Standing) -> None:
        """Write the module's parameters, from where its replica stands."""
        ...

    def gradients(
        self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], displacements: Tensor, data: Data
    ) -> ReplicaGradients:
        """This process's share of the losses, `(M,)`, and columns `(M, n)` of the gradients, at displacements `(M, n)`.

        The shares of all processes sum to the losses.
        """
        ...

    def part(self, vector: Tensor) -> Tensor:
        """The columns held here, `(n,)`, of a vector `(N,)` that all processes have."""
        ...

    def whole(self, part: Tensor) -> Tensor:
        """A vector `(N,)` from its columns in all processes."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """Sum over the processes of a small fp64 tensor on the CPU."""
        ...

    def agree(self, message: Tensor) -> Tensor:
        """What the first process with a replica says, where some have none and cannot know."""
        ...

    def spread_from_first(self, tensors: Sequence[Tensor], phase: str) -> None:
        """Overwrite tensors with those of the first process."""
        ...

    def said_by_server(self, message: Tensor) -> Tensor:
        """What the first process that holds columns says."""
        ...

    def together(self, call: Callable[[], bool], meet: Callable[[], None]) -> None:
        """Make a call that all processes make: whatever members come or go, either all end it or none does.

        `call` returns whether it was a step, after which newcomers may come in. It is made again if it was interrupted
        before all servers were prepared. `meet` comes after every change of members: all then make it.
        """
        ...

    def prepared(self, undo: Callable[[], None] | None = None, *, stepped: bool = False) -> None:
        """Nothing that others do can keep this process from ending the call; `undo` takes back what it has done.

        It comes right before the last collectives of the call, those that bring results to others; `stepped` says that
        it is a step.
        """
        ...

    def all_prepared(self) -> None:
        """Wait until all are prepared, after which nobody undoes the call: for results that cannot go back."""
        ...

    def end_together(
        self, finish: Callable[[], None], undo: Callable[[], None] | None = None, *, stepped: bool = False
    ) -> None:
        """`finish` a call when all have come to this, and before one goes on; `undo` takes that back.

        It is for calls whose last collective does not bring results that `meet` brings too.
        """
        ...
