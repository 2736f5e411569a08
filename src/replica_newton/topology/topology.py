"""What an optimizer asks of a topology."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from replica_newton.topology.layout import Layout
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
    def rank(self) -> int:
        """Of this process; 0 where there is only one."""
        ...

    @property
    def layout(self) -> Layout:
        """Who is who among the processes."""
        ...

    @property
    def distributed(self) -> bool:
        """Whether the replicas live in processes of their own, each in a module that stands where it does."""
        ...

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
