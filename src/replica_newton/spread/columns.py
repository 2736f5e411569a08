"""How processes share rows of N elements."""

from typing import Protocol

from torch import Tensor


class Columns(Protocol):
    """How processes share rows of N elements: n columns each. A `Topology` is one."""

    def part(self, vector: Tensor) -> Tensor:
        """The columns held here, `(n,)`, of a vector `(N,)` that all processes have."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """Sum over the processes of a small fp64 tensor on the CPU."""
        ...
