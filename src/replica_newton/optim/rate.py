"""DistanceRate: a learning rate from how far the weights have to go, with nothing to tune."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHARE = 0.3
"""Of the distance, that one step of unit size covers. By experiment: see docs/step_rules.md."""
_ALL_ZERO = 0.01
"""Distance where all weights are zero at first, in their own unit: it grows from there."""
_GROWTH = 1.25
_OUTWARD = 0.4
"""A network on digits with usual first weights came to 0.31, a linear one that began at zero to 0.64."""
_MEMORY = 0.9


class DistanceRate:
    """Learning rate for steps of unit size, such as those of `Metric`.

        η_t = share · D_t · min(1, t/warm_up),      D_1 = ‖w_1‖/√N.

    D is an estimate of how far each weight will move: about as far as weights are long when they are drawn, which is
    what every usual initialisation is made for. Multiply all weights by c (and let the loss read w/c), and the rate is
    multiplied by c; multiply the loss by c, and nothing changes.

    Weights that begin at zero, or far too small, are found out by gradients that point outward for long: `−⟨g, w⟩` as a
    cosine, averaged over about ten steps, is above 0.4. D then grows by a quarter a step, but not beyond the weights'
    present size `‖w_t‖/√N`.

    Args:
        share: the part of D that a step covers; > 0.
        warm_up: steps until the rate is whole, >= 1; averages over gradients are not to be trusted before.

    Attributes:
        distance: D, None before the first step.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        The distance to go as the unit of a rate: Ivgi, Hinder and Carmon (2023), arXiv 2302.12022; weights' own size in
        its place: You et al. (2020), arXiv 1904.00962, layer by layer and at every step.
    """

    def __init__(self, *, share: float = SHARE, warm_up: int = 20) -> None:
        if not 0.0 < share < float("inf"):
            raise ValueError(f"{share=} must be positive and finite")
        if not warm_up >= 1:
            raise ValueError(f"{warm_up=} must be >= 1")
        self.share = share
        self.warm_up = warm_up
        self.distance: float | None = None
        self._steps = 0
        self._outward = 0.0

    def __call__(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
        """The rate of the next step.

        Args:
            parameters: all that is trained, before the step.
            gradients: of what is minimised, in the same order.

        Returns:
            η.
        """
        sums = torch.stack([_products(w, g) for w, g in zip(parameters, gradients, strict=True)]).sum(dim=0)
        along, weights, slopes = sums.tolist()
        count = sum(w.numel() for w in parameters)
        size = (weights / count) ** 0.5 if count else 0.0
        scale = (weights * slopes) ** 0.5
        self._steps += 1
        self._outward = _MEMORY * self._outward + (1.0 - _MEMORY) * (-along / scale if scale else 0.0)
        if self.distance is None:
            self.distance = size or _ALL_ZERO
        elif self._outward > _OUTWARD:
            self.distance = max(self.distance, min(_GROWTH * self.distance, size))
        return self.share * self.distance * min(1.0, self._steps / self.warm_up)

    def state_dict(self) -> dict[str, Any]:
        """What it has seen."""
        return {"distance": self.distance, "steps": self._steps, "outward": self._outward}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: what `state_dict` returned.
        """
        self.distance, self._steps, self._outward = state["distance"], state["steps"], state["outward"]


def _products(weight: Tensor, gradient: Tensor) -> Tensor:
    """`⟨w, g⟩, ⟨w, w⟩, ⟨g, g⟩` in fp64."""
    w, g = weight.detach().flatten().double(), gradient.flatten().double()
    return torch.stack((w @ g, w @ w, g @ g))
