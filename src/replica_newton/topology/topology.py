"""What an optimizer asks of a topology."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from replica_newton.topology.simulated import Data, ReplicaGradients


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
    def distributed(self) -> bool:
        """Whether the replicas live in processes of their own, each in a module that stands where it does."""
        ...

    @property
    def workers(self) -> list[int]:
        """M names of the replicas, which they keep when others come or go."""
        ...

    steps: int
    """Steps asked for so far, taken or given up."""

    def points(self, parameters: Tensor, displacements: Tensor) -> Tensor:
        """Where the local replicas stand, `(local, N)`, from the module's parameters, `(N,)`, and columns `(M, n)`."""
        ...

    def published(self, shared: Tensor, displacements: Tensor, size: int) -> Tensor:
        """What the module's N parameters become, from columns `(n,)` of those all share and `(M, n)` displacements."""
        ...

    def gradients(
        self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], points: Tensor, data: Data
    ) -> ReplicaGradients:
        """Losses `(local,)` and gradients `(local, N)` of the local replicas at their points."""
        ...

    def columns(self, rows: Tensor) -> Tensor:
        """Rows of the local replicas, `(local, N)`, as the columns of all rows held here, `(M, n)`."""
        ...

    def part(self, vector: Tensor) -> Tensor:
        """The columns held here, `(n,)`, of a vector `(N,)` that all processes have."""
        ...

    def whole(self, part: Tensor, size: int) -> Tensor:
        """A vector of N elements from its columns in all processes."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """Sum over the processes of a small fp64 tensor on the CPU."""
        ...

    def by_replica(self, values: Tensor) -> Tensor:
        """Numbers `(M, k)` of all replicas, fp64 on the CPU, from those of the local ones, `(local, k)`."""
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

    def agree_to_give_up(self, give_up: Callable[[], None], undo: Callable[[], None]) -> None:
        """Give up a step when all know that it will be, and before one goes on; `undo` takes that back."""
        ...
