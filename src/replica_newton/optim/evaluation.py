"""What one evaluation of all replicas gave, and what all processes must know of it before they go on."""

from collections.abc import Callable

import torch
from torch import Tensor

from replica_newton.curvature.gram import inner_products


class Evaluation:
    """Gradients of all replicas, and losses that are summed over the processes on the way with other sums.

    A step waits for the number of its sums rather than for their size. So the losses, whether all is finite, and the
    length of the mean gradient travel with the first sum that the step needs anyway.

    Args:
        total: sums an fp64 tensor on the CPU over the processes.
        losses: `(M,)`, this process's share.
        gradients: `(M, n)`, the columns held here.

    Attributes:
        gradients: as given.
        mean: `(n,)`, their mean over the replicas.
    """

    def __init__(self, total: Callable[[Tensor], Tensor], losses: Tensor, gradients: Tensor) -> None:
        self.gradients = gradients
        self.mean = gradients.mean(dim=0)
        self._total = total
        squared_norm = inner_products(self.mean[None], self.mean[None]).flatten()
        wrong = torch.zeros(len(losses), dtype=torch.float64)
        if not bool(torch.isfinite(squared_norm)):  # only then is it worth looking at every replica
            wrong = (~torch.isfinite(gradients).all(dim=1)).double().cpu()
        self._numbers = torch.cat((wrong, losses.double().cpu(), squared_norm))
        self._summed = False

    def total(self, sums: Tensor) -> Tensor:
        """Sum over the processes; the first call takes what is known of this evaluation along.

        Args:
            sums: `(k,)`, fp64 on the CPU.

        Returns:
            The sums.

        Raises:
            FloatingPointError: if a loss or gradient is not finite; by all processes.
        """
        if self._summed:
            return self._total(sums)
        self._summed = True
        self._numbers, sums = torch.split(
            self._total(torch.cat((self._numbers, sums))), [len(self._numbers), len(sums)]
        )
        losses = self.losses
        sound = (self._numbers[: len(losses)] == 0.0) & torch.isfinite(losses)
        if not bool(sound.all()):
            replica = int((~sound).nonzero()[0])
            loss = float(losses[replica])
            raise FloatingPointError(f"loss or gradient of replica {replica} is not finite (loss {loss})")
        return sums

    @property
    def losses(self) -> Tensor:
        """Losses of all replicas, `(M,)` fp64 on the CPU."""
        self.settle()
        return self._numbers[len(self._numbers) // 2 : -1]

    @property
    def norm(self) -> float:
        """Length of the mean gradient."""
        self.settle()
        return float(self._numbers[-1].sqrt())

    def settle(self) -> None:
        """Sum what is known of this evaluation, unless it has been summed on the way; raises as `total` does."""
        if not self._summed:
            self.total(self._numbers.new_empty(0))
