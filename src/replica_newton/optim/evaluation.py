"""What one evaluation of all replicas gave, and what all processes must know of it before they go on."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from replica_newton.curvature.gram import inner_products


class Evaluation(NamedTuple):
    """Columns of all gradients, `(M, n)`, their mean over replicas, `(n,)`, and what is to be summed about them."""

    gradients: Tensor
    mean: Tensor
    report: "Report"


class Report:
    """Losses, whether all is finite, and the length of the mean gradient, summed on the way with other sums.

    A step waits for the number of its sums rather than for their size. So this travels with the first sum that the step
    needs anyway.

    Args:
        total: sums an fp64 tensor on the CPU over the processes.
        losses: `(M,)`, this process's share.
        gradients: `(M, n)`, the columns held here.
        mean: `(n,)`, theirs over the replicas.
        with_norm: whether the length of the mean gradient will be asked for, which costs a pass over it.
    """

    def __init__(
        self,
        total: Callable[[Tensor], Tensor],
        losses: Tensor,
        gradients: Tensor,
        mean: Tensor,
        *,
        with_norm: bool = False,
    ) -> None:
        self._total = total
        self._replicas = len(losses)
        wrong = torch.zeros(len(losses), dtype=torch.float64)
        if not bool(torch.isfinite(mean.sum())):  # only then is it worth looking at every replica
            wrong = (~torch.isfinite(gradients).all(dim=1)).double().cpu()
        squared_norm = inner_products(mean[None], mean[None]).flatten() if with_norm else wrong.new_zeros(1)
        self._numbers = torch.cat((wrong, losses.double().cpu(), squared_norm))
        self._summed = False

    def total(self, sums: Tensor) -> Tensor:
        """Sum over the processes; the first call takes the report along.

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
        everything = self._total(torch.cat((self._numbers, sums.flatten())))
        self._numbers, others = torch.split(everything, [len(self._numbers), sums.numel()])
        losses = self.losses
        sound = (self._numbers[: self._replicas] == 0.0) & torch.isfinite(losses)
        if not bool(sound.all()):
            replica = int((~sound).nonzero()[0])
            loss = float(losses[replica])
            raise FloatingPointError(f"loss or gradient of replica {replica} is not finite (loss {loss})")
        return others.reshape(sums.shape)

    @property
    def losses(self) -> Tensor:
        """Losses of all replicas, `(M,)` fp64 on the CPU."""
        self.settle()
        return self._numbers[self._replicas : -1]

    @property
    def norm(self) -> float:
        """Length of the mean gradient, if it was wanted."""
        self.settle()
        return float(self._numbers[-1].sqrt())

    def settle(self) -> None:
        """Sum the report, unless it has been summed on the way; raises as `total` does."""
        if not self._summed:
            self.total(self._numbers.new_empty(0))
