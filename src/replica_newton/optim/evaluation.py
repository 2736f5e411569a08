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


class StepMemory(NamedTuple):
    """What a step over processes was made of, and the next one writes to: a fresh page costs more than to fill it.

    Nothing of it is written to before the first sum of the next step, but for the gradients: until then the step may be
    undone, back to these displacements and shared parameters.

    Attributes:
        displacements: `(M, n)`, before the step.
        gradients: `(M, n)`.
        mean: `(n,)`, of the gradients.
        shared: `(n,)`, parameters before the step.
    """

    displacements: Tensor | None = None
    gradients: Tensor | None = None
    mean: Tensor | None = None
    shared: Tensor | None = None

    def fits(self, displacements: Tensor) -> bool:
        """Whether a step from these displacements may write to it."""
        own = self.displacements
        if own is None or own.data_ptr() == displacements.data_ptr():
            return False
        return all(getattr(own, name) == getattr(displacements, name) for name in ("shape", "dtype", "device"))


NO_MEMORY = StepMemory()


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
        self._gradients = gradients
        squared_norm = float(inner_products(mean[None], mean[None])) if with_norm else 0.0
        # A sum is not finite where an element of any replica is not, and hardly ever else.
        other = torch.tensor([float(mean.sum()), squared_norm], dtype=torch.float64)
        self._numbers = torch.cat((losses.double().cpu(), other))
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
        if not bool(self._numbers.isfinite().all()):
            self._blame()
        return others.reshape(sums.shape)

    def _blame(self) -> None:
        """Find out who it is whose loss or gradient is not finite, and raise, unless it was a sum alone."""
        wrong = self._total((~torch.isfinite(self._gradients).all(dim=1)).double().cpu())
        sound = (wrong == 0.0) & torch.isfinite(self.losses)
        if not bool(sound.all()):
            replica = int((~sound).nonzero()[0])
            loss = float(self.losses[replica])
            raise FloatingPointError(f"loss or gradient of replica {replica} is not finite (loss {loss})")

    @property
    def losses(self) -> Tensor:
        """Losses of all replicas, `(M,)` fp64 on the CPU."""
        self.settle()
        return self._numbers[:-2]

    @property
    def norm(self) -> float:
        """Length of the mean gradient, if it was wanted."""
        self.settle()
        return float(self._numbers[-1].sqrt())

    def settle(self) -> None:
        """Sum the report, unless it has been summed on the way; raises as `total` does."""
        if not self._summed:
            self.total(self._numbers.new_empty(0))
