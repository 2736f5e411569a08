"""MetricStep: steps of unit size in a metric, at a rate from the distance to go."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from replica_newton.optim.metric import Metric
from replica_newton.optim.rate import DistanceRate
from replica_newton.topology import Topology


class MetricStep:
    """The rule "metric": `w ← w − lr · η_t · U_t`, with U of `Metric` and η of `DistanceRate`.

    Args:
        metric: which coordinates, and the averages in them.
        rate: how far a step of unit size goes.
    """

    STATE = (*Metric.STATE, "last", "before_last")
    """What the state of a parameter may hold, beside the number of its steps."""

    def __init__(self, metric: Metric | None = None, rate: DistanceRate | None = None) -> None:
        self.metric = Metric() if metric is None else metric
        self.rate = DistanceRate() if rate is None else rate

    def take(self, moved: Sequence[tuple[Tensor, Tensor, float, dict[str, Any]]]) -> None:
        """Move parameters and their states by a step; nothing is changed if it cannot be taken.

        Args:
            moved: parameters, their gradients of what is minimised, their relative rates, and what the metric keeps.

        Raises:
            ValueError: if a gradient is sparse.
            FloatingPointError: if a gradient is not finite.
        """
        gradients = [gradient for _, gradient, _, _ in moved]
        if any(gradient.layout != torch.strided for gradient in gradients):
            raise ValueError("sparse gradients are not supported")
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise FloatingPointError("a gradient is not finite")
        if not moved:
            return
        self._observe_slopes(moved)
        rate = self.rate([parameter for parameter, *_ in moved])
        for parameter, gradient, relative, state in moved:
            unit = self.metric.unit_step(state, gradient)
            state["before_last"], state["last"] = state.get("last", unit), unit
            parameter.add_(unit.to(parameter.dtype), alpha=-relative * rate)

    def _observe_slopes(self, moved: Sequence[tuple[Tensor, Tensor, float, dict[str, Any]]]) -> None:
        """Slopes of the present gradients down the last two steps, every parameter weighted by its relative rate."""
        known = [entry for entry in moved if "last" in entry[3]]
        largest = max((relative for _, _, relative, _ in known), default=0.0)
        if largest == 0.0:
            return
        slopes = []
        for name in ("last", "before_last"):
            sums = [
                torch.stack((_dot(gradient, state[name]) * relative, _dot(state[name], state[name]) * relative**2))
                for _, gradient, relative, state in known
            ]
            slope, square = torch.stack(sums).sum(dim=0).tolist()
            slopes.append(slope / square**0.5 if square else 0.0)
        self.rate.observe(slopes[0], slopes[1], largest)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return one.flatten().to(torch.float64) @ other.flatten().to(torch.float64)


def check_options(topology: Topology, **options: Any) -> None:
    """Check that no option is given that has no meaning for the rule: it takes no secants.

    Args:
        topology: of the optimizer.
        options: of the other rules.

    Raises:
        ValueError: if there is one.
    """
    if topology.distributed:
        raise ValueError(f"rule='metric' needs its replicas in one process, got {topology!r}")
    for name, unset in {"spread": None, "secant_data": "own", "damping": 0.0, "max_norm": None}.items():
        if options[name] != unset:
            raise ValueError(f"{name}={options[name]!r} has no meaning for rule='metric'")


def evaluated(closure: Callable[[], Tensor]) -> Tensor:
    """Loss of a closure that leaves gradients in `.grad`.

    Args:
        closure: any.

    Returns:
        The loss.

    Raises:
        FloatingPointError: if it is not finite.
    """
    with torch.enable_grad():
        loss = closure().detach()
    if not bool(loss.isfinite().all()):
        raise FloatingPointError(f"loss is not finite ({float(loss)})")
    return loss
