"""Where replicas stand: the parameters that they share, and how far each is away from them."""

import torch
from torch import Tensor


class Standing:
    """M replicas at `w + d_m`, in the columns that this process holds.

    Args:
        shared: `(n,)`, w.
        displacements: `(M, n)`, the d_m.

    Attributes:
        shared: as given.
        displacements: as given.
    """

    def __init__(self, shared: Tensor, displacements: Tensor) -> None:
        self.shared = shared
        self.displacements = displacements

    def points(self, columns: slice, memory: Tensor) -> Tensor:
        """Where they stand, in some of the columns.

        Args:
            columns: which.
            memory: for as many elements as there are, which are written to it.

        Returns:
            `(M, len(columns))`, of `memory`.
        """
        points = memory.view(len(self.displacements), -1)
        return torch.add(self.shared[columns], self.displacements[:, columns], out=points)
