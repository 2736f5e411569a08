"""MetricStep: steps of unit size in a metric, at a rate from the distance to go."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replica_newton.curvature.gram import working_dtype
from replica_newton.optim.metric import Metric
from replica_newton.optim.paired_probes import PairedProbes
from replica_newton.optim.rate import DistanceRate
from replica_newton.topology import Topology, TreeReduction

_AVERAGED = 8.0


def average_weight(step: int) -> float:
    """Weight of the newest point in the average that a `MetricStep` keeps.

    Args:
        step: how many steps have been taken, >= 1.

    Returns:
        `(1 + η)/(t + η)` with η = 8: polynomial-decay averaging, over about the last ninth of all steps.

    Source:
        Shamir and Zhang (2013), arXiv 1212.1824, section 4.
    """
    return (1.0 + _AVERAGED) / (step + _AVERAGED)


class Moved(NamedTuple):
    """A parameter, its gradient of what is minimised, its group's rate and decay, and what is kept of its past."""

    parameter: Tensor
    gradient: Tensor
    relative: float
    decay: float
    state: dict[str, Any]


class MetricStep:
    """The rule "metric": `w ← (1 − lr η_t λ) w − lr η_t U_t`, with U of `Metric` and η of `DistanceRate`.

    Beside w it keeps a running average over about the last ninth of all steps, whatever their number:

        w̄ ← w̄ + 9/(t + 8) · (w − w̄).

    Args:
        metric: which coordinates, and the averages in them.
        rate: how far a step of unit size goes.
        probes: bend U by curvature; see `PairedProbes`. None leaves it the metric's.
    """

    STATE = (*Metric.STATE, "last", "before_last", "average", "whole")
    """What the state of a parameter may hold, beside the number of its steps."""

    def __init__(
        self, metric: Metric | None = None, rate: DistanceRate | None = None, probes: PairedProbes | None = None
    ) -> None:
        self.metric = Metric() if metric is None else metric
        self.rate = DistanceRate() if rate is None else rate
        self.probes = probes

    def prepare(self, moved: Sequence[Moved], largest: float, total: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Find out what must be known of all parameters; nothing is changed yet, nor if the step cannot be taken.

        Args:
            moved: what is this process's to move.
            largest: relative rate of all parameters.
            total: sums over the processes that move parameters.

        Returns:
            What takes the step: it moves parameters and their states, and asks nobody but for probes.

        Raises:
            FloatingPointError: if a gradient is not finite; by all processes.
        """
        elements, wrong, squared_size, *slopes = total(self._sums(moved)).tolist()
        if wrong:
            raise FloatingPointError("a gradient is not finite")

        def take() -> None:
            if not elements:
                return
            if largest:
                pairs = zip(slopes[::2], slopes[1::2], strict=True)
                last, before_last = (slope / square**0.5 if square else 0.0 for slope, square in pairs)
                self.rate.observe(last, before_last, largest)
            self._move(moved, self.rate((squared_size / elements) ** 0.5))

        return take

    def _move(self, moved: Sequence[Moved], rate: float) -> None:
        """A step at this rate."""
        units: Sequence[Tensor] = [self.metric.unit_step(one.state, one.gradient) for one in moved]
        if self.probes is not None:
            units = self.probes.bent(self.metric, [one.state for one in moved], units, rate)
        for unit, (parameter, _, relative, decay, state) in zip(units, moved, strict=True):
            state["before_last"], state["last"] = state.get("last", unit), unit
            if decay:
                parameter.mul_(1.0 - relative * rate * decay)
            parameter.add_(unit.to(parameter.dtype), alpha=-relative * rate)
            if "average" not in state:
                state["average"] = parameter.detach().to(unit.dtype, copy=True)
            state["average"].lerp_(parameter.to(unit.dtype), average_weight(state["step"]))

    def _sums(self, moved: Sequence[Moved]) -> Tensor:
        """What must be known of all parameters.

        Returns:
            `(7,)`, fp64 on the CPU: N, how many gradients are not finite, ‖w‖²; then of the last step and of the one
            before the slope down it and its squared length, every parameter weighted by its relative rate.
        """
        if not moved:
            return torch.zeros(7, dtype=torch.float64)
        table = torch.stack([_numbers(one) for one in moved])
        sound, size, slope, length, slope_before, length_before = table.cpu().unbind(dim=1)
        relative = sound.new_tensor([one.relative for one in moved])
        # A sum can overflow where no element does.
        wrong = 0 if bool(sound.isfinite().all()) else sum(not one.gradient.isfinite().all() for one in moved)
        elements = sum(one.parameter.numel() for one in moved)
        sums = [size @ size, slope @ relative, (length * relative).square().sum()]
        sums += [slope_before @ relative, (length_before * relative).square().sum()]
        return torch.cat((sound.new_tensor([elements, wrong]), torch.stack(sums)))


def _numbers(moved: Moved) -> Tensor:
    """`(6,)`: sum of a parameter's gradient, ‖w‖, and the slopes down its last two steps, each with its length."""
    gradient = moved.gradient.flatten().to(working_dtype(moved.gradient))
    numbers = [gradient.sum(), torch.linalg.vector_norm(moved.parameter, dtype=gradient.dtype)]
    for name in ("last", "before_last"):
        step = moved.state.get(name, gradient.new_zeros(0)).flatten()
        slope = gradient @ step if len(step) else gradient.new_zeros(())
        numbers += [slope, torch.linalg.vector_norm(step)]
    return torch.stack(numbers).double()


def check_options(topology: Topology, **options: Any) -> None:
    """Check that no option is given that has no meaning for the rule: it takes no secants.

    Args:
        topology: of the optimizer.
        options: of the other rules.

    Raises:
        ValueError: if there is one.
    """
    whole = not topology.distributed or (isinstance(topology, TreeReduction) and topology.shards == 1)
    if isinstance(options["spread"], PairedProbes) and not whole:
        needed = "one process or a TreeReduction of whole replicas"
        raise ValueError(f"spread=PairedProbes() needs {needed}, got {topology!r}")
    if isinstance(options["spread"], PairedProbes):
        options["spread"] = None
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
