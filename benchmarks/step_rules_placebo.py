"""The placebo of `PairedProbes`: directions that know nothing of the curvature, at the same price."""

import torch
from torch import Tensor

from replica_newton import PairedProbes, TrackedSubspace
from replica_newton.optim.paired_probes import Held


class RandomSubspace(TrackedSubspace):
    """Random directions that stay, with smoothed Rayleigh quotients for eigenvalues."""

    def __init__(self, order: int, size: int, *, smoothing: float, seed: int, device: torch.device) -> None:
        super().__init__(order, size, smoothing=smoothing, seed=seed, device=device)
        self._random = super().directions(order)
        self._quotients: Tensor | None = None

    def directions(self, count: int) -> Tensor:
        """See `TrackedSubspace`; all of them, whatever the number of replicas."""
        return self._random[torch.arange(count) % self.order]

    def observe(self, responses: Tensor) -> None:
        """See `TrackedSubspace`."""
        now = (responses[: self.order] * self._random).sum(dim=1).double()
        self._quotients = now if self._quotients is None else torch.lerp(self._quotients, now, self.smoothing)

    @property
    def eigenvalues(self) -> Tensor:
        """Quotients."""
        return torch.empty(0, dtype=torch.float64) if self._quotients is None else self._quotients

    @property
    def eigenvectors(self) -> Tensor:
        """The directions."""
        return self._random

    @property
    def uncertainties(self) -> Tensor:
        """None: every quotient is taken for what it is."""
        return torch.zeros_like(self.eigenvalues)


class RandomProbes(PairedProbes):
    """Probes along `RandomSubspace`; as many replicas as its rank at least."""

    def _new_spaces(self, held: Held) -> list[TrackedSubspace]:
        return [
            RandomSubspace(self.rank, size, smoothing=self.smoothing, seed=self.seed + place, device=held.device)
            for place, size in enumerate(held.sizes)
        ]
