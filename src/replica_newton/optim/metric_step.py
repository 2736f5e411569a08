"""MetricStep: steps of unit size in a metric, at a rate from the distance to go."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from replica_newton.optim.metric import Metric
from replica_newton.optim.rate import DistanceRate


class MetricStep:
    """The rule "metric": `w ← w − lr · η_t · U_t`, with U of `Metric` and η of `DistanceRate`.

    Args:
        metric: which coordinates, and the averages in them.
        rate: how far a step of unit size goes.
    """

    def __init__(self, metric: Metric | None = None, rate: DistanceRate | None = None) -> None:
        self.metric = Metric() if metric is None else metric
        self.rate = DistanceRate() if rate is None else rate

    def take(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        rates: Sequence[float],
        states: Sequence[dict[str, Any]],
    ) -> None:
        """Move parameters and their states by a step; nothing is changed if it cannot be taken.

        Args:
            parameters: those that have a gradient.
            gradients: of what is minimised.
            rates: relative rate of every parameter.
            states: of the metric, a dictionary for every parameter.

        Raises:
            ValueError: if a gradient is sparse.
            FloatingPointError: if a gradient is not finite.
        """
        if any(gradient.layout != torch.strided for gradient in gradients):
            raise ValueError("sparse gradients are not supported")
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise FloatingPointError("a gradient is not finite")
        rate = self.rate(parameters, gradients)
        for parameter, gradient, relative, state in zip(parameters, gradients, rates, states, strict=True):
            unit = self.metric.unit_step(state, gradient)
            parameter.add_(unit.to(parameter.dtype), alpha=-relative * rate)
